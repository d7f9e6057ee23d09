"""Checkpoints of every published form load; bad or harmful files are rejected with a reason."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pallava.release.weights import WeightFolder, open_weight_file
from pathcore.weights import (
    ZERO_MODEL_FILE,
    CheckpointError,
    check_finite,
    check_loading_report,
    load_strict,
    read_shard_index,
    read_state_dict,
    read_torch_file,
    safe_types,
    strip_prefix_to_fit,
    write_state_dict,
)
from tests.pallava import goldens

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([1, 2])}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor] = TENSORS) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("wrapper", [None, "state_dict", "module", "model"])
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
def test_a_pickled_file_loads(tmp_path: Path, name: str, wrapper: str | None) -> None:
    content = {wrapper: TENSORS, "meta": {"iter": 3}} if wrapper else TENSORS
    torch.save(content, tmp_path / name)
    assert_same(read_state_dict(tmp_path / name))
    assert_same(read_state_dict(str(tmp_path / name)))


def test_an_old_style_file_loads(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(tmp_path / "a.pth"))


def test_safetensors_load(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert_same(read_state_dict(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "adapter_model.bin",
        ZERO_MODEL_FILE,
    ],
)
def test_a_folder_loads(tmp_path: Path, name: str) -> None:
    save = save_file if name.endswith(".safetensors") else torch.save
    content = {"module": TENSORS, "ds_version": "0.19"} if name == ZERO_MODEL_FILE else TENSORS
    save(content, tmp_path / name)
    assert_same(read_state_dict(tmp_path))


def test_the_folder_that_deepspeed_writes_above_its_own_loads(tmp_path: Path) -> None:
    (tmp_path / "iter_20.pth").mkdir()
    torch.save({"module": TENSORS}, tmp_path / "iter_20.pth" / ZERO_MODEL_FILE)
    (tmp_path / "latest").write_text("iter_20.pth\n")
    assert_same(read_state_dict(tmp_path))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_folder_loads(tmp_path: Path, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        shard = f"{stem}-0000{number}-of-00002.{suffix}"
        save({name: tensor}, tmp_path / shard)
        weight_map[name] = shard
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_same(read_state_dict(tmp_path))

    weight_map["c.weight"] = weight_map["b.bias"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"the shards lack c\.weight"):
        read_state_dict(tmp_path)
    weight_map["c.weight"] = f"{stem}-00003-of-00003.{suffix}"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"index\.json: shard '.*00003-of-00003.*' is missing"
    ):
        read_state_dict(tmp_path)


def test_leftovers_of_an_earlier_save_are_not_read(tmp_path: Path) -> None:
    first, second = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    save_file({"a": torch.ones(2)}, first)
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, second)
    index = {"weight_map": {"a": first.name, "b": second.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_state_dict(tmp_path)["a"].tolist() == [1, 1]
    save_file({"a": torch.full((2,), 3.0)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path)["a"].tolist() == [3, 3]


@pytest.mark.parametrize("safe", [True, False])
def test_hugging_faces_own_shards_load(tmp_path: Path, safe: bool) -> None:
    model = goldens.llm(r=0)
    model.save_pretrained(tmp_path, max_shard_size="100KB", safe_serialization=safe)
    assert len(list(tmp_path.glob("*-of-*"))) > 2
    assert_same(read_state_dict(tmp_path), model.state_dict())
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path, safe_serialization=safe)  # leaves the index behind
    assert list(tmp_path.glob("*.index.json")) and not list(tmp_path.glob("*-of-*"))
    assert_same(read_state_dict(tmp_path), model.state_dict())
    assert set(WeightFolder(tmp_path)) == set(model.state_dict())


def test_a_peft_adapter_folder_loads(tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    model = goldens.llm()
    model.save_pretrained(tmp_path)
    found = read_state_dict(tmp_path)
    assert_same(found, get_peft_model_state_dict(model))
    assert all(".lora_" in name and ".default" not in name for name in found)


def test_both_published_forms_hold_the_same_names() -> None:
    pth = read_state_dict(goldens.RELEASED_PTH)
    zero2 = read_state_dict(goldens.RELEASED_ZERO2)
    assert pth.keys() == zero2.keys()
    assert len(pth) == 65
    for name, tensor in zero2.items():
        wanted = torch.bfloat16 if pth[name].is_floating_point() else pth[name].dtype
        assert tensor.dtype == wanted
        assert torch.equal(tensor, pth[name].to(wanted)), name


def mmengine_checkpoint(path: Path) -> None:
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(
        {
            "meta": {"iter": 2, "cfg": ConfigDict(a=1), "lr": np.float64(0.1), "n": np.int64(3)},
            "message_hub": {"log_scalars": {"train/loss": history}, "step": np.array([1, 2])},
            "state_dict": TENSORS,
        },
        path,
    )


WITHOUT_MMENGINE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmengine", "deepspeed", "xtuner"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from pathcore.weights import read_state_dict
print({name: tensor.tolist() for name, tensor in read_state_dict(sys.argv[1]).items()})
assert "mmengine" not in sys.modules
"""


@pytest.fixture
def nothing_allowed() -> Iterator[None]:
    """As in a new process: other tests prepare this one for training."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.usefixtures("nothing_allowed")
def test_a_checkpoint_of_mmengine_loads_without_mmengine(tmp_path: Path) -> None:
    mmengine_checkpoint(tmp_path / "iter_2.pth")
    with pytest.raises(pickle.UnpicklingError):  # torch alone refuses it
        torch.load(tmp_path / "iter_2.pth", weights_only=True)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MMENGINE, str(tmp_path / "iter_2.pth")],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {name: tensor.tolist() for name, tensor in TENSORS.items()}
    assert result.stdout.strip() == str(expected)


def test_a_resumed_run_gets_its_history_back(tmp_path: Path) -> None:
    from mmengine.logging import HistoryBuffer

    mmengine_checkpoint(tmp_path / "iter_2.pth")
    with torch.serialization.safe_globals(safe_types(HistoryBuffer)):
        loaded = torch.load(tmp_path / "iter_2.pth", weights_only=True)
    history = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    assert history.mean() == 1.5
    assert history.statistics("max") == 2.0
    assert loaded["meta"]["lr"] == np.float64(0.1)


class RunsACommand:
    """Pickles to a call of os.system, as a harmful file would."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


class ReadsAnAttribute:
    """Pickles to a `getattr` that our short list of types must not widen."""

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (Path, "write_text")


@pytest.mark.parametrize("name", ["a.pth", "pytorch_model.bin", ZERO_MODEL_FILE])
def test_a_file_that_runs_a_command_is_refused(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    harmful = {"state_dict": TENSORS, "extra": RunsACommand(f"touch {trace}")}
    torch.save(harmful, tmp_path / name)
    torch.load(tmp_path / name, weights_only=False)
    assert trace.exists()  # the file does what it is made for
    trace.unlink()
    path = tmp_path if name != "a.pth" else tmp_path / name
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as a checkpoint"):
        read_state_dict(path)
    assert not trace.exists()


def test_a_raw_pickle_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(RunsACommand(f"touch {trace}"), protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_state_dict(tmp_path / "a.pth")
    assert not trace.exists()


@pytest.mark.parametrize("by_name", [True, False])
def test_a_zero_stage_is_read_as_any_python_writes_it(tmp_path: Path, by_name: bool) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class Stage:
        """Pickles as a member does: in Python 3.11.0 to 3.11.3 by name, elsewhere by value."""

        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (getattr, (ZeroStageEnum, "gradients")) if by_name else (ZeroStageEnum, (2,))

    torch.save({"zero_stage": Stage()}, tmp_path / "a.pt")
    assert read_torch_file(tmp_path / "a.pt") == {"zero_stage": 2}


def test_a_getattr_beyond_log_statistics_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "extra": ReadsAnAttribute()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_state_dict(tmp_path / "a.pth")


def test_a_getattr_of_a_history_gives_its_statistics_alone() -> None:
    from mmengine.logging import HistoryBuffer

    restricted = next(
        entry[0]
        for entry in safe_types(HistoryBuffer)
        if isinstance(entry, tuple) and entry[1] == "builtins.getattr"
    )
    assert restricted(HistoryBuffer, "mean") is HistoryBuffer.mean
    for owner, name in ((HistoryBuffer, "__init__"), (os, "system"), (HistoryBuffer([]), "mean")):
        with pytest.raises(CheckpointError, match="not allowed in a checkpoint"):
            restricted(owner, name)


def linear() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})


def test_strict_loading_copies_every_tensor() -> None:
    source, target = linear(), linear()
    load_strict(target, source.state_dict(), what="model")
    assert_same(target.state_dict(), source.state_dict())
    with torch.device("meta"):
        unfilled = linear()
    load_strict(unfilled, source.state_dict(), what="model")
    assert_same(unfilled.state_dict(), source.state_dict())


def test_missing_unexpected_and_misshapen_names_are_listed() -> None:
    target = linear()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    wrong = dict(linear().state_dict())
    del wrong["a.weight"]
    wrong |= {"c.weight": torch.zeros(1), "b.bias": torch.zeros(7)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(target, wrong, what="model", source="some.pth")
    assert str(caught.value).splitlines() == [
        "some.pth does not fit the model: 1 missing, 1 unexpected, 1 of another shape "
        "(of 4 expected)",
        "  missing: a.weight",
        "  unexpected: c.weight",
        "  other shape: b.bias: (7,) found, (1,) expected",
    ]
    assert_same(target.state_dict(), before)


def test_long_lists_are_cut() -> None:
    with pytest.raises(CheckpointError, match=r"30 unexpected.*(?s:.*)19, \.\.\. 10 more$"):
        tensors = {**linear().state_dict(), **{f"x{i:02}": torch.zeros(1) for i in range(30)}}
        load_strict(linear(), tensors, what="model")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"iter_9\.pth: no such file or folder"):
        read_state_dict(tmp_path / "iter_9.pth")


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"expected {ZERO_MODEL_FILE}.*model\.safetensors"):
        read_state_dict(tmp_path)


def test_a_zero3_folder_says_how_to_gather_it(tmp_path: Path) -> None:
    torch.save({"module": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"ZeRO-3.*zero_to_fp32\.py"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "..", "/etc/passwd", "deep/a.safetensors"]
)
def test_a_shard_elsewhere_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "hf").mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    index = {"weight_map": {"a.weight": shard}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is outside the folder"):
        read_state_dict(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a..b", "a\\b", "a\nb", ""])
def test_a_path_as_a_tensors_name_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.zeros(2)}, tmp_path / "bad.pth")
    save_file({name: torch.zeros(2)}, tmp_path / "bad.safetensors")
    for file in ("bad.pth", "bad.safetensors"):
        with pytest.raises(CheckpointError, match="under the name"):
            read_state_dict(tmp_path / file)
        with pytest.raises(CheckpointError, match="under the name"):
            open_weight_file(tmp_path / file)


@pytest.mark.parametrize("tag", ["../elsewhere", "..", "/tmp", "", "absent"])
def test_a_tag_elsewhere_is_not_followed(tmp_path: Path, tag: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        torch.save({"module": TENSORS}, folder / ZERO_MODEL_FILE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        read_state_dict(tmp_path / "run")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"state_dict": {}}])
def test_a_file_without_tensors_says_what_it_found(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: holds no named tensors; found"):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("damage", ["text", "half", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    save = save_file if name.endswith(".safetensors") else torch.save
    save({f"{i}.weight": torch.ones(64) for i in range(20)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    content = {"text": b"<html>404</html>", "half": whole[: len(whole) // 2], "empty": b""}
    (tmp_path / name).write_bytes(content[damage])
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as a checkpoint"):
        read_state_dict(tmp_path / name)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"weights": 1}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            read_state_dict(tmp_path)


def test_an_archive_is_not_a_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_state_dict(tmp_path / "a.pth")


def test_reading_a_checkpoint_leaves_allowed_what_was_allowed(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, file)
    allowed = safe_types()
    torch.serialization.add_safe_globals(allowed)
    before = set(torch.serialization.get_safe_globals())
    read_state_dict(file)
    assert set(torch.serialization.get_safe_globals()) == before >= set(allowed)


OTHERS = {"a.weight": torch.zeros(2, 3), "b.bias": torch.zeros(2)}


def optimizer_state() -> dict[str, Any]:
    """State of a real optimizer after a step."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def prefixed(prefix: str, tensors: dict[str, Tensor] = TENSORS) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": TENSORS, "meta": {"iter": 3}},
        {"model": TENSORS, "optimizer": "AdamW", "epoch": 3},
        {"model_state_dict": TENSORS},
        {"model": {"state_dict": TENSORS}},
        {"state_dict": {"model": TENSORS}},
        {"student": OTHERS, "teacher": TENSORS, "dino_loss": {"center": torch.zeros(1)}},
        {"student": TENSORS},
        {"model": TENSORS, "model_ema": OTHERS},
        prefixed("module."),
        prefixed("_orig_mod."),
        {"state_dict": prefixed("module._orig_mod.")},
        {**TENSORS, "epoch": 3},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_wrap_around_weights(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(tmp_path / "a.pth"))
    assert_same(read_state_dict(tmp_path / "a.pth", mmap=True))


@pytest.mark.usefixtures("nothing_allowed")
def test_settings_beside_the_weights(tmp_path: Path) -> None:
    """MAE, RETFound, HIPT and DINO store their parsed arguments."""
    arguments = argparse.Namespace(
        lr=1e-3,
        output_dir="/data",
        betas=(0.9, 0.95),
        device=torch.device("cpu"),
    )
    counts: Any = collections.defaultdict(int, a=1)
    content = {
        "model": TENSORS,
        "optimizer": optimizer_state(),
        "scaler": {"scale": 65536.0},
        "args": arguments,
        "counts": counts,
        "best": np.float64(0.5),
    }
    torch.save(content, tmp_path / "checkpoint-799.pth")
    with pytest.raises(Exception, match="Namespace"):
        torch.load(tmp_path / "checkpoint-799.pth", weights_only=True)
    assert_same(read_state_dict(tmp_path / "checkpoint-799.pth"))


class MyTrainer:
    """A class of some training script."""


def test_an_object_that_is_no_data_is_named(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "trainer": MyTrainer()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"test_weights\.MyTrainer.*would run code") as caught:
        read_state_dict(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "pytorch_model.bin")
    assert_same(read_state_dict(tmp_path / "pytorch_model.bin"))
    assert_same(read_state_dict(tmp_path))
    torch.save(TENSORS, tmp_path / "a.safetensors")
    assert_same(read_state_dict(tmp_path / "a.safetensors"))
    torch.save(TENSORS, tmp_path / "checkpoint.pth.tar")
    assert_same(read_state_dict(tmp_path / "checkpoint.pth.tar"))


def test_torchscript(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    torch.jit.script(layer).save(str(tmp_path / "ViT.pt"))
    assert_same(read_state_dict(tmp_path / "ViT.pt"), layer.state_dict())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def write_foreign(path: Path, kind: str) -> None:
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **{"Transformer/encoder": np.zeros(3)})
    elif kind in ("png", "jpeg", "tiff"):
        with open(path, "wb") as file:
            Image.new("RGB", (4, 4)).save(file, kind)
    elif kind == "h5":
        import h5py

        with h5py.File(path, "w") as file:
            file["weights"] = np.zeros(3)
    else:
        texts = {
            "lfs": LFS,
            "html": b"\n<!DOCTYPE html><html>Google Drive can't scan this file</html>",
            "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "json": b'{"architecture": "vit"}',
            "gzip": b"\x1f\x8b\x08\x00" + bytes(9),
            "empty": b"",
        }
        path.write_bytes(texts[kind])


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lfs", "a Git LFS pointer .*git lfs pull"),
        ("html", "an HTML page"),
        ("xml", "an XML document"),
        ("json", "JSON text"),
        ("gzip", "a gzip archive; unpack"),
        ("empty", "empty"),
        ("png", "a PNG image"),
        ("jpeg", "a JPEG image"),
        ("tiff", "a TIFF image"),
        ("npz", "an archive of NumPy arrays.*timm reads"),
        ("h5", "an HDF5 file"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, kind: str, message: str, name: str) -> None:
    write_foreign(tmp_path / name, kind)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read.*: it is {message}"):
        read_state_dict(tmp_path / name)


def test_written_files_read_back(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    tensors = {"q": whole[:2], "k": whole[2:], "t": whole.t()}  # share one storage
    for name in ("a.safetensors", "a.pth", "a.pt"):
        write_state_dict(tmp_path / name, tensors)
        assert_same(read_state_dict(tmp_path / name), tensors)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        write_state_dict(tmp_path / "a.bin", tensors)


def test_a_hint_ends_the_list_of_what_does_not_fit() -> None:
    with pytest.raises(
        CheckpointError, match=r"(?s)1 missing, 2 unexpected.*weight.*Is it a BERT"
    ) as caught:
        load_strict(
            nn.Linear(3, 2, bias=False),
            TENSORS,
            what="layer",
            hint=lambda found: "Is it a BERT?" if "b.bias" in found else "",
        )
    assert str(caught.value).endswith("  Is it a BERT?")


def test_a_prefix_goes_where_the_names_then_fit() -> None:
    teacher = {**prefixed("backbone."), "head.mlp.0.weight": torch.zeros(1)}
    assert_same(strip_prefix_to_fit(teacher, TENSORS))
    assert_same(strip_prefix_to_fit(TENSORS, TENSORS))
    assert_same(strip_prefix_to_fit(prefixed("0.auto_model."), TENSORS))
    towers = {**prefixed("text_model."), **prefixed("vision_model.")}
    assert_same(strip_prefix_to_fit(towers, TENSORS), towers)
    named_like_a_prefix = {"model.weight": torch.zeros(1)}
    assert_same(strip_prefix_to_fit(named_like_a_prefix, ["model.weight"]), named_like_a_prefix)


def test_values_that_are_not_finite() -> None:
    check_finite(TENSORS, "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: b\.weight holds values"):
        check_finite({**TENSORS, "b.weight": torch.tensor([1.0, float("nan")])}, "a.pth")


@pytest.mark.parametrize(
    ("layers", "hidden", "message"),
    [(2, 8, None), (3, 8, "16 missing"), (1, 8, "16 unexpected"), (2, 12, "another shape")],
)
def test_the_loading_report_of_transformers(
    tmp_path: Path, layers: int, hidden: int, message: str | None
) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    sizes = dict(vocab_size=11, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path)
    config = BertConfig(**{**sizes, "hidden_size": hidden}, num_hidden_layers=layers)
    model, report = BertModel.from_pretrained(
        tmp_path,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        add_pooling_layer=False,
    )
    if message is None:
        check_loading_report(report, model, what="BERT", source=tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        check_loading_report(report, model, what="BERT", source=tmp_path)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", ".."])
def test_an_index_points_into_its_own_folder(tmp_path: Path, shard: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{shard}"}}}}')
    with pytest.raises(CheckpointError, match="is outside the folder"):
        read_shard_index(index)


@pytest.mark.parametrize("mmap", [False, True])
def test_an_archive_that_was_packed_again_with_compression_is_inflated(
    tmp_path: Path, mmap: bool
) -> None:
    """Mapped into memory, its compressed bytes would be taken for the values."""
    state = {"norm.weight": torch.ones(4), "fc.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    found = read_state_dict(tmp_path / "packed.bin", mmap=mmap)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_changed_bytes_are_noticed_by_the_checksums_of_the_archive(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.full((64,), 1.5)}, tmp_path / "model.pth")
    content = bytearray((tmp_path / "model.pth").read_bytes())
    at = content.index(np.full(64, 1.5, np.float32).tobytes())
    content[at + 3] ^= 1
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        read_state_dict(tmp_path / "model.pth")


def test_a_damaged_directory_of_an_archive_is_one_clear_error(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    end = content.rindex(b"data.pkl")
    (tmp_path / "model.pth").write_bytes(content[:end] + b"\xff" + content[end + 1 :])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_state_dict(tmp_path / "model.pth")


def test_an_entry_that_is_marked_as_a_folder_is_damage(tmp_path: Path) -> None:
    """torch reads nothing for it and returns what happened to be in memory."""
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "model.pth")
    content = bytearray((tmp_path / "model.pth").read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] |= 0x10
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="data/0 is marked as a folder"):
        read_state_dict(tmp_path / "model.pth")
