"""What the processor is and can, because ratios depend on it."""

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
    flags = _flags(cpuinfo)
    return not flags or bool({"avx512_bf16", "amx_bf16"} & flags)


def describe(cpuinfo: Path = _CPUINFO) -> str:
    """Returns name, number of cores and vector instructions of the processor."""
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    known = [flag for flag in _FLAGS if flag in _flags(cpuinfo)]
    return f"{name[1] if name else 'processor'}, {os.cpu_count()} cores, {' '.join(known)}"


def _flags(cpuinfo: Path) -> set[str]:
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()
