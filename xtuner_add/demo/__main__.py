"""``python -m xtuner_add.demo``: the same as ``xtuner-add demo``."""

from xtuner_add.commands.demos import demo as command

if __name__ == "__main__":
    command()
