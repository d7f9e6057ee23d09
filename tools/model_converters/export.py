"""All parts to one folder: `xtuner-add export` for those who run scripts."""

from xtuner_add.commands.release import export

if __name__ == "__main__":
    export()
