"""A checkpoint to Hugging Face folders: `xtuner-add pth-to-hf` for those who run scripts."""

from xtuner_add.commands.release import pth_to_hf

if __name__ == "__main__":
    pth_to_hf()
