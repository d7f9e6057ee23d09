"""``python -m xtuner_add.demo``: the same as ``xtuner-add demo``."""

from xtuner_add.demo_command import command

if __name__ == "__main__":
    command()
