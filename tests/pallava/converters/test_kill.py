"""A conversion that is killed repeatedly ends with the same files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallava.converters.published import CAPTION, write_lines

CONVERT = """
import sys, time
from pallava.converters.conversion import convert
from pallava.registry import CONVERTERS

slow = float(sys.argv[3])
def progress(count):
    print(count, flush=True)
    time.sleep(slow)
convert(CONVERTERS.get("pmc-oa")(sys.argv[1]), sys.argv[2], check_images=False, part_rows=50,
        progress=progress)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_kill_nine(tmp_path: Path) -> None:
    rows = [{"image": f"PMC{n}.jpg", "caption": f"{CAPTION} {n}"} for n in range(1000)]
    data = write_lines(tmp_path / "pmc_oa.jsonl", rows)

    def start(out: str, slow: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CONVERT, str(data), str(tmp_path / out), str(slow)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    assert start("plain", 0).wait() == 0
    chance = random.Random(0)
    for _ in range(4):
        process = start("killed", 0.002)
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 20)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start("killed", 0)
    assert process.wait() == 0
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
