"""``python -m xtuner_add.demo_pathgen``: the same as ``xtuner-add demo-pathgen``."""

from xtuner_add.demo_pathgen_command import command

if __name__ == "__main__":
    command()
