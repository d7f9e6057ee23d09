"""Peak memory of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peak_resident_mib() -> Iterator[list[float]]:
    """Measures the growth of peak resident memory; NaN if /proc does not provide it."""
    result = [float("nan")]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak that the kernel records
        before = _status_mib("VmRSS")
    except OSError:
        yield result
        return
    yield result
    result[0] = _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024
