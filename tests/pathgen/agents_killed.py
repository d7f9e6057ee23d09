"""Describes rows until it is killed: run by a test as a process of its own."""

from __future__ import annotations

import sys

from pathgen.agents.backends import OpenAIBackend
from pathgen.agents.captions import describe
from pathgen.agents.steps import run_step

if __name__ == "__main__":
    url, rows, out, images = sys.argv[1:]
    backend = OpenAIBackend(url, "m", concurrency=1)
    run_step(describe(), backend, rows, out, images=images, progress=False)
