"""LoRA adapters into their base model: `xtuner-add merge` for those who run scripts."""

from xtuner_add.commands.release import merge

if __name__ == "__main__":
    merge()
