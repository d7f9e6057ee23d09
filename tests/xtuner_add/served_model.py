"""Starts `xtuner-add serve` in a separate process, and makes slides for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

MODEL = ("llama", "--llava", "llava", "--visual-encoder", "plip", "--device", "cpu")
MPP = 0.5


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        pid: Process id.
        port: Port on loopback.
        temporary: Folder of its temporary files.
    """

    pid: int
    port: int
    temporary: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def peak_kib(self) -> int:
        """Returns the peak memory of the server."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


@contextmanager
def served(root: Path, *options: object, environ: Any = None) -> Iterator[Server]:
    """Runs the command in a folder that `make_folders` filled."""
    temporary = Path(tempfile.mkdtemp(dir=root))
    command = [sys.executable, "-m", "xtuner_add.cli", "serve", *MODEL, "--port", "0", *options]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=root,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **(environ or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)/ ", first)
        assert found, first
        yield Server(process.pid, int(found[1]), temporary)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        assert not list(temporary.glob("xtuner-add-serve-*")), "uploads are deleted in the end"


def make_slides(folder: Path) -> Path:
    """A pyramid in a TIFF that states its resolution, a plain image, and things that are none."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:1024, 0:2048]
    pixels = np.stack([x // 8, y // 4, 255 - x // 8], axis=-1).astype(np.uint8)
    per_cm = 1e4 / MPP
    with tifffile.TiffWriter(folder / "tissue.tiff") as writer:
        for step in (1, 4):
            writer.write(
                pixels[::step, ::step],
                tile=(256, 256),
                photometric="rgb",
                compression="deflate",
                subfiletype=0 if step == 1 else 1,
                resolution=(per_cm / step, per_cm / step),
                resolutionunit="CENTIMETER",
            )
    Image.fromarray(pixels[:600, :400]).save(folder / "photo.png")
    (folder / "notes.txt").write_text("no slide")
    outside = folder.parent / "outside.png"
    Image.fromarray(pixels[:50, :50]).save(outside)
    (folder / "link.png").symlink_to(outside)
    return folder
