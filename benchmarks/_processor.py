"""What the processor is and can, because ratios depend on it, and how much of it was used."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_CPUINFO = Path("/proc/cpuinfo")


def has_bf16(cpuinfo: Path = _CPUINFO) -> bool:
    """Returns whether the processor multiplies bf16; without, it takes ten times as long as fp32.

    True where this is unknown.
    """
    flags = _read(cpuinfo)[1]
    return not flags or bool({"avx512_bf16", "amx_bf16"} & flags)


def describe(cpuinfo: Path = _CPUINFO) -> str:
    """Returns name, number of cores and vector instructions of the processor."""
    name, flags = _read(cpuinfo)
    known = [flag for flag in _FLAGS if flag in flags]
    return f"{name or 'processor'}, {os.cpu_count()} cores, {' '.join(known)}"


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read(cpuinfo: Path) -> tuple[str, set[str]]:
    """Returns name and flags of the first processor; both are empty where this is unknown."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name, flags = (
        found[1] if (found := re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)) else ""
        for field in ("model name", "flags")
    )
    return name, set(flags.split())
