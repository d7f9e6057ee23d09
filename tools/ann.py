#!/usr/bin/env python
"""``python tools/ann.py``, as CITE publishes it: the same as ``xtuner-add cite-splits``."""

from xtuner_add.commands.cite import splits

if __name__ == "__main__":
    splits()
