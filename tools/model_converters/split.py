"""A model to one tensor per shard: `xtuner-add split` for those who run scripts."""

from xtuner_add.commands.release import split

if __name__ == "__main__":
    split()
