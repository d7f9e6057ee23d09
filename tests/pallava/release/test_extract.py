from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pallava.release.extract import extract_adapter
from pallava.release.merge import check_merge, merge
from pathcore.weights import CheckpointError
from tests.pallava.release.models import load, save_adapter, save_llama


def test_check_finds_one_changed_number(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "out", progress=False)
    whole = check_merge(base, [adapter], tmp_path / "out", progress=False)
    assert (whole.num_equal, whole.roundings) == (whole.num_tensors, 0.0)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name][0, 0] += 1
    save_file(tensors, shard)
    changed = check_merge(base, [adapter], tmp_path / "out", progress=False)
    assert changed.worst == name and changed.roundings > 1


def test_extracted_adapter_leads_to_the_tuned_model(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["input_layernorm"])
    merge(base, [adapter], tmp_path / "tuned", progress=False)
    lost = extract_adapter(base, tmp_path / "tuned", tmp_path / "found", rank=4, progress=False)
    assert lost < 1e-4
    merge(base, [tmp_path / "found"], tmp_path / "again", progress=False)
    again = load(tmp_path / "again").state_dict()
    for name, tensor in load(tmp_path / "tuned").state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
    assert (
        extract_adapter(base, tmp_path / "tuned", tmp_path / "less", rank=1, progress=False) > 0.1
    )


def test_nothing_to_extract(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    with pytest.raises(CheckpointError, match="does not differ"):
        extract_adapter(base, base, tmp_path / "found", rank=4, progress=False)
