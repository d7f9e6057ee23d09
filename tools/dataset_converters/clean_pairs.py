"""Rows that show human pathology: `xtuner-add clean-pairs` for those who run scripts."""

from xtuner_add.commands.datasets import clean_pairs

if __name__ == "__main__":
    clean_pairs()
