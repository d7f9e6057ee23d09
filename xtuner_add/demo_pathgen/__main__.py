"""``python -m xtuner_add.demo_pathgen``: the same as ``xtuner-add demo-pathgen``."""

from xtuner_add.commands.demos import demo_pathgen as command

if __name__ == "__main__":
    command()
