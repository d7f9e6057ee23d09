"""Pairs to conversations: `xtuner-add dataformat` for those who run scripts."""

from xtuner_add.commands.datasets import dataformat

if __name__ == "__main__":
    dataformat()
