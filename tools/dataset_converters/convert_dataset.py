"""A public dataset to training files: `xtuner-add convert-dataset` for those who run scripts."""

from xtuner_add.commands.datasets import convert_dataset

if __name__ == "__main__":
    convert_dataset()
