"""Conversations to tokens: `xtuner-add tokenise` for those who run scripts."""

from xtuner_add.commands.datasets import tokenise

if __name__ == "__main__":
    tokenise()
