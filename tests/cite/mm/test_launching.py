"""A run closes its process group when it ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_RUN = """
import atexit
import torch.distributed as dist
# Called last, since it was registered first.
atexit.register(lambda: print("still open" if dist.is_initialized() else "closed"))
import cite.mm.launching
assert dist.is_initialized()
{end}
"""


@pytest.mark.parametrize(("end", "state"), [("", "closed"), ("raise SystemError", "still open")])
def test_the_group_is_closed_unless_the_run_failed(end: str, state: str) -> None:
    """Others that wait for a failed process would make it wait for them in turn."""
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", _RUN.format(end=end)],
        env={**os.environ, **launched, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.splitlines()[-1:] == [state], ended.stderr
    assert ended.returncode == (1 if end else 0)
