"""The processor's name and instructions are read as Linux gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks._processor import describe, has_bf16

INTEL = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f amx_bf16 sse\n"
AMD = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 sse\n"


@pytest.mark.parametrize(("text", "expected"), [(INTEL, True), (AMD, False), ("", True)])
def test_bf16_needs_an_instruction(text: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16(tmp_path / "cpuinfo") is expected


def test_the_description_names_what_ratios_depend_on(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(INTEL)
    found = describe(tmp_path / "cpuinfo")
    assert found.startswith("Intel(R) Xeon(R), ")
    assert found.endswith("avx2 avx512f amx_bf16")
    assert describe(tmp_path / "absent").startswith("processor, ")
