from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import gigapath
from gigapath.slide_encoder import create_model, find_slide_weights, register_architecture
from pathcore.weights import read_state_dict
from tests.gigapath.slide_goldens import golden_json, recipe_inputs

ARCH = "gigapath_slide_enc12l768d"
REPOSITORY = "prov-gigapath/prov-gigapath"
TINY = "tiny_of_the_weights_test"
register_architecture(TINY, embed_dim=32, depth=2, num_heads=4)


def released_shapes() -> dict[str, list[int]]:
    recorded = golden_json("slide/state_dict_names")[ARCH]
    return {
        name.replace("layers.0.", f"layers.{layer}."): shape
        for name, shape in recorded["state_dict_with_layer_0_only"].items()
        for layer in range(recorded["depth"] if "layers.0." in name else 1)
    }


def put_into_cache(file: Path, cache: Path) -> None:
    """Lays a file out as `huggingface_hub` does after a download."""
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    commit = hashlib.sha1(b"made up").hexdigest()
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    blob = folder / "blobs" / "0123"
    shutil.move(file, blob)
    (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A hub cache with a made-up checkpoint of the released names and shapes: 345 MB."""
    folder = tmp_path_factory.mktemp("hub")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in released_shapes().items():
        values = torch.empty(shape).uniform_(-0.03, 0.03, generator=generator)
        state[name] = values + 1.0 if len(shape) == 1 and name.endswith("weight") else values
    file = folder / "slide_encoder.pth"
    torch.save({"model": state}, file)
    assert 345e6 < file.stat().st_size < 346e6
    put_into_cache(file, folder / "cache")
    yield folder / "cache"
    shutil.rmtree(folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return monkeypatch


def test_the_published_snippet(released: Path, offline: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    offline.setattr(constants, "HF_HUB_CACHE", str(released))
    tile_embed, coordinates = recipe_inputs("snippet", 1, 50, 1536)
    scope = dict(torch=torch, tile_embed=tile_embed, coordinates=coordinates)
    exec(
        """
import gigapath

slide_encoder = gigapath.slide_encoder.create_model("hf_hub:prov-gigapath/prov-gigapath", "gigapath_slide_enc12l768d", 1536)
""",  # noqa: E501
        scope,
    )
    exec(
        """
slide_encoder.eval()
with torch.no_grad():
    output = slide_encoder(tile_embed, coordinates).squeeze()
""",
        scope,
    )
    output = scope["output"]
    assert isinstance(output, Tensor)
    assert output.shape == (768,)
    assert bool(torch.isfinite(output).all())
    path = find_slide_weights(f"hf_hub:{REPOSITORY}", str(released))
    assert path.name == "slide_encoder.pth"
    state = torch.load(path, weights_only=True, mmap=True)["model"]
    loaded = scope["slide_encoder"].state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert gigapath.slide_encoder.create_model is create_model


def test_loading_needs_no_whole_table(released: Path, offline: pytest.MonkeyPatch) -> None:
    sizes = []
    empty = torch.empty

    def counted(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        sizes.append(0 if tensor.is_meta else tensor.numel())
        return tensor

    offline.setattr(torch, "empty", counted)
    model = create_model(
        f"hf_hub:{REPOSITORY}@main", ARCH, 1536, local_dir=str(released), global_pool=True
    )
    held = [*model.parameters(), *model.buffers(), model.pos_axis]
    assert sum(tensor.numel() for tensor in held) < 1.02 * 86330880
    assert not sum(sizes)
    assert not model.training
    assert all(p.requires_grad and p.dtype is torch.float32 for p in model.parameters())


def test_a_failed_download_says_what_to_do(tmp_path: Path, offline: pytest.MonkeyPatch) -> None:
    message = (
        r"hf_hub:prov-gigapath/prov-gigapath: slide_encoder.pth is neither in the local cache nor "
        r"could it be downloaded .* set HF_TOKEN, or give the path of a downloaded file"
    )
    with pytest.raises(FileNotFoundError, match=message):
        create_model(f"hf_hub:{REPOSITORY}", ARCH, 1536, local_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="HFValidationError"):
        create_model("hf_hub:no//repository", ARCH, 1536, local_dir=str(tmp_path))


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create_model("", TINY, 8).state_dict()


def same(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return list(found) == list(state) and all(torch.equal(found[k], state[k]) for k in state)


def test_files_and_folders(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    torch.save(state, tmp_path / "bare.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({k: v.double() for k, v in state.items()}, tmp_path / "double.pth")
    save_file(state, tmp_path / "slide.safetensors")
    for name in ("slide_encoder.pth", "bare.pth", "old.pth", "double.pth", "slide.safetensors"):
        assert same(create_model(tmp_path / name, TINY, 8), state), name
    assert same(create_model(str(tmp_path), TINY, 8), state)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither slide_encoder"):
        create_model(folder, TINY, 8)
    save_file(state, folder / "slide_encoder.safetensors")
    assert same(create_model(folder, TINY, 8), state)
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file; .* pass ''"):
        create_model(tmp_path / "none.pth", TINY, 8)


def test_the_file_may_go_after_loading(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": state}, path)
    model = create_model(path, TINY, 8)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(model, state)


def changed(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    state = dict(state)
    if what == "partial":
        return {name: state[name] for name in list(state)[:5]}
    if what == "missing":
        del state["encoder.layers.1.ffn.fc1.weight"]
    elif what == "unknown":
        state["decoder_embed.weight"] = torch.zeros(2)
    elif what == "shape":
        state["norm.bias"] = torch.zeros(33)
    elif what == "not finite":
        state["norm.bias"] = torch.full((32,), float("nan"))
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("partial", r"missing: .*, \.\.\. \d+ more"),
        ("missing", r"(?s)does not fit the .*1 missing.*: encoder.layers.1.ffn.fc1.weight"),
        ("unknown", r"(?s)1 unexpected.*: decoder_embed.weight"),
        ("shape", r"(?s)1 of another shape.*: norm.bias: \(33,\) found, \(32,\) expected"),
        ("not finite", "norm.bias holds values that are not finite"),
    ],
)
def test_weights_that_do_not_all_fit_are_refused(
    what: str, message: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": changed(state, what)}, path)
    with pytest.raises(ValueError, match=message) as error:
        create_model(path, TINY, 8)
    assert str(path) in str(error.value)


def test_another_size_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "slide_encoder.pth"
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match=f"Its shapes are those of {TINY} with in_chans 8"):
        create_model(path, "gigapath_slide_enc12l384d", 384)
    with pytest.raises(ValueError, match=f"(?s)patch_embed.proj.weight.* {TINY} with in_chans 8"):
        create_model(path, TINY, 9)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/must-not-appear",)


def test_code_and_rubbish_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match=r"weights.pth: cannot be read as a checkpoint"):
        read_state_dict(path)
    assert not Path("/tmp/must-not-appear").exists()
    torch.save({"model": state}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs", pickle.dumps(3)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights.pth: "):
            read_state_dict(path)
    torch.save({"model": {"norm.bias": 3}}, path)
    with pytest.raises(ValueError, match=r"holds no named tensors; found \['norm.bias'\]"):
        read_state_dict(path)
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"weights.safetensors: cannot be read"):
        read_state_dict(broken)


def test_a_downloaded_file_in_local_dir_is_used(
    state: dict[str, Tensor], tmp_path: Path, offline: pytest.MonkeyPatch
) -> None:
    """The original downloads into `local_dir`; LazySlide passes the folder of an earlier run."""
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    model = create_model(f"hf_hub:{REPOSITORY}", TINY, 8, local_dir=tmp_path)
    assert same(model, state)
    with pytest.raises(FileNotFoundError, match="neither in the local cache"):
        create_model(f"hf_hub:{REPOSITORY}@v1", TINY, 8, local_dir=tmp_path)


def test_published_sizes_are_models_of_timm() -> None:
    model = timm.create_model("gigapath_slide_enc12l384d", pretrained=False, in_chans=384)
    assert model.training and model.embed_dim == 384
    assert sum(p.numel() for p in model.parameters()) == 21_489_408
    assert (
        model.state_dict().keys()
        == create_model("", "gigapath_slide_enc12l384d", 384).state_dict().keys()
    )
    with pytest.raises(ValueError, match="create_model"):
        timm.create_model("gigapath_slide_enc12l384d", pretrained=True)
