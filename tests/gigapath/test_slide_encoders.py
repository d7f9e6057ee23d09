"""Slide encoders by name: networks against their equations, origins, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from gigapath.embed import slide_encoders
from gigapath.embed.features_job import Bag, encode_slides, join_bags, read_patients
from gigapath.embed.slide_encoders import (
    AttentionPool,
    NamedSlideEncoder,
    OriginError,
    SlideEncoderError,
    check_origin,
    complete_origin,
    describe_named_slide_encoder,
    get_slide_preset,
    list_slide_encoders,
    origin_of_file,
)
from gigapath.embed.slide_vectors import describe_slide_encoder
from gigapath.slide_encoder import create_model
from pathcore.encoders import get_preset
from pathcore.encoders.origin import TileOrigin
from pathcore.encoders.presets import PresetError
from pathcore.weights import CheckpointError
from wsi.conform import read_feature_file
from wsi.store import write_features
from xtuner_add import cli

CPU = torch.device("cpu")
ATTENTION = [n for n in list_slide_encoders() if get_slide_preset(n).network == "attention"]
CODE = [n for n in list_slide_encoders() if get_slide_preset(n).authors_code]
PARAMETERS = {"prov-gigapath": 86_330_880, "gigapath-flash": 21_489_408, "chief": 656_641,
              "feather-conch-v1.5": 788_097, "feather-uni": 919_169,
              "feather-uni2-h": 1_181_313}  # fmt: skip


def published_weights(name: str, path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Made-up weights under the names of the published file, with the tensors nobody needs."""
    preset = get_slide_preset(name)
    size = preset.arguments
    random = torch.Generator().manual_seed(seed)

    def linear(prefix: str, out_dim: int, in_dim: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(out_dim, in_dim, generator=random) / in_dim**0.5
        return {
            f"{prefix}.weight": weight,
            f"{prefix}.bias": torch.randn(out_dim, generator=random),
        }

    embed_dim, hidden = size["embed_dim"], size["hidden_dim"]
    first, attention = ("attention_net.0", "attention_net.3.attention_") if name == "chief" else (
        "model.patch_embed.0", "model.global_attn.attention_")  # fmt: skip
    tensors = {
        **linear(first, embed_dim, size["in_dim"]),
        **linear(f"{attention}a.0", hidden, embed_dim),
        **linear(f"{attention}b.0", hidden, embed_dim),
        **linear(f"{attention}c", 1, hidden),
    }
    if name == "chief":
        extra = {**linear("classifiers", 2, 512), **linear("instance_classifiers.0", 2, 512),
                 **linear("instance_classifiers.1", 2, 512), **linear("att_head.fc1", 256, 512),
                 **linear("att_head.fc2", 1, 256), **linear("text_to_vision.0", 512, 768),
                 "organ_embedding": torch.randn(19, 768, generator=random)}  # fmt: skip
        torch.save({**tensors, **extra}, path)
    else:
        save_file({**tensors, **linear("model.classifier", 108, embed_dim)}, path)
    return {key.removeprefix("model."): value for key, value in tensors.items()}


def file_of(name: str, folder: Path) -> Path:
    return folder / get_slide_preset(name).files[0]


def bag_of(width: int, num: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    coords = np.stack([np.arange(num) % 3, np.arange(num) // 3], 1) * 512
    return random.normal(size=(num, width)).astype(np.float32), coords.astype(np.int64)


@pytest.mark.parametrize("name", list_slide_encoders())
def test_presets_at_their_real_size(name: str) -> None:
    preset = get_slide_preset(name)
    widths = {get_preset(encoder).embed_dim for encoder in preset.patch_encoders}
    trained = name not in ("mean", "max")
    assert trained == bool(widths) == bool(preset.patch_px) == bool(preset.mpp)
    assert (preset.hub or preset.source or not trained) and preset.citation
    with torch.device("meta"):
        if preset.network == "attention":
            model: Any = AttentionPool(**preset.arguments)
            pooled = preset.arguments["in_dim" if name == "chief" else "embed_dim"]
            assert widths == {preset.arguments["in_dim"]} and preset.embed_dim == pooled
        elif preset.network == "longnet":
            size = preset.arguments
            model = create_model("", size["model_arch"], size["in_chans"])
            assert widths == {size["in_chans"]}
        else:
            assert name not in PARAMETERS
            return
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_mil_is_what_its_paper_says(name: str, tmp_path: Path) -> None:
    file = file_of(name, tmp_path)
    weights = {key: value.double().numpy() for key, value in published_weights(name, file).items()}
    project, value, gate, score = (
        (weights[f"{key}.weight"], weights[f"{key}.bias"])
        for key in [n.removesuffix(".weight") for n in weights if n.endswith("weight")]
    )
    features, coords = bag_of(get_slide_preset(name).arguments["in_dim"])
    x = features.astype(np.float64)
    h = np.maximum(x @ project[0].T + project[1], 0)
    gated = np.tanh(h @ value[0].T + value[1]) / (1 + np.exp(-(h @ gate[0].T + gate[1])))
    scores = (gated @ score[0].T + score[1])[:, 0]
    attention = np.exp(scores) / np.exp(scores).sum()
    encoder = describe_named_slide_encoder(f"{name}@{file}")
    assert encoder == describe_named_slide_encoder(f"{name}@{tmp_path}").__class__(
        name, str(file), encoder.digest
    )
    found = encoder.vector(encoder.open(CPU), features, coords, 512, "s")
    expected = attention @ (x if name == "chief" else h)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["chief", "feather-uni"])
def test_weights_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    tensors = published_weights(name, file_of(name, tmp_path))
    removed = next(iter(tensors))
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != removed}, "1 missing, 0 unexpected"),
        ({**tensors, "second_layer.weight": torch.zeros(2)}, "0 missing, 1 unexpected"),
    ):
        torch.save(changed, file)
        with pytest.raises(CheckpointError, match=message):
            describe_named_slide_encoder(f"{name}@{file}").open(CPU)


def test_mean_and_max() -> None:
    features, coords = bag_of(24)
    for name, expected in (("mean", features.mean(0)), ("max", features.max(0))):
        encoder = describe_named_slide_encoder(name)
        found = encoder.vector(encoder.open(CPU), features, coords, 256, "s")
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SlideEncoderError, match="did you mean feather-uni2-h"):
        describe_named_slide_encoder("feather_uni2_h")
    with pytest.raises(FileNotFoundError, match=r"chief@/path/to/CHIEF_pretraining\.pth"):
        describe_named_slide_encoder("chief")
    for folder, content in (
        ("good", {"extends": "chief", "patch_encoders": ["uni"]}),
        ("bad", {"network": "transformer"}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"mine-{folder}.json").write_text(json.dumps(content))
    own = list(slide_encoders._folders())
    both = [*own, tmp_path / "good", tmp_path / "bad"]
    monkeypatch.setattr(slide_encoders, "_folders", lambda: iter(both))
    slide_encoders._files.cache_clear()
    try:
        assert get_slide_preset("mine-good").patch_encoders == ("uni",)
        with pytest.raises(PresetError, match="network 'transformer', expected module:function"):
            get_slide_preset("mine-bad")
    finally:
        slide_encoders._files.cache_clear()


REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_slide"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def encode_slide_from_patch_features(self, features, coords, patch_size):
        assert features.ndim == coords.ndim == 3 and coords.dtype == torch.int64
        cells = (coords - coords.amin(1, keepdim=True)) // patch_size
        return self.scale * (features * (1 + cells.sum(-1, keepdim=True))).mean(1)

    def slide_representations(self, features):
        return {"image_embedding": self.scale * features.sum(1), "image_latents": None}
"""

PACKAGE_CODE = {
    "madeleine/models/Model.py": """
import torch
class _Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.projector = torch.nn.Linear(config.patch_embedding_dim, 4, bias=False)
    def encode_he(self, feats, device):
        return self.projector(feats.to(device)).mean(1)
def create_model(model_cfg, device="cpu"):
    return _Model(model_cfg).to(device)
""",
    "cobra/model/cobra.py": """
import torch
class Cobra(torch.nn.Module):
    def __init__(self, embed_dim, input_dims, num_heads, layers, att_dim, d_state, dropout=0.25):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))
        assert (layers, num_heads) in ((1, 4), (2, 8))
    def forward(self, x):
        return self.scale * x.amin(1)
""",
}


@pytest.mark.parametrize("name", CODE)
def test_authors_code_runs_only_on_request(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SlideEncoderError, match=r"read it, .*pass trust_remote_code=True"):
        describe_named_slide_encoder(f"{name}@{tmp_path}")
    preset = get_slide_preset(name)
    if preset.packages and not any(p in ("environs", "sacremoses") for p in preset.packages):
        with pytest.raises(SlideEncoderError, match=f"needs {preset.packages[0]}; install by"):
            describe_named_slide_encoder(f"{name}@{tmp_path}", trust_remote_code=True)
    packages = tmp_path / "packages"
    for path, code in {**PACKAGE_CODE, "environs.py": "", "sacremoses.py": ""}.items():
        (packages / path).parent.mkdir(parents=True, exist_ok=True)
        (packages / path).write_text(code)
    monkeypatch.syspath_prepend(str(packages))
    weights = tmp_path / "weights"
    weights.mkdir()
    width = get_preset(preset.patch_encoders[0]).embed_dim
    features, coords = bag_of(width)
    if name in ("titan", "prism"):
        monkeypatch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m")
        )
        config = {"model_type": "tiny_slide", "architectures": ["TinyModel"], "auto_map": {
            "AutoConfig": "modeling.TinyConfig", "AutoModel": "modeling.TinyModel"}}  # fmt: skip
        (weights / "config.json").write_text(json.dumps(config))
        (weights / "modeling.py").write_text(REMOTE_CODE)
        save_file({"scale": torch.full((1,), 2.0)}, weights / "model.safetensors", {"format": "pt"})
        cells = coords.sum(1, keepdims=True) // 512
        expected = 2 * ((features * (1 + cells)).mean(0) if name == "titan" else features.sum(0))
    elif name == "madeleine":
        matrix = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
        torch.save({"module.projector.weight": matrix}, weights / "model.pt")
        (weights / "model_config.json").write_text(json.dumps({"patch_embedding_dim": 512}))
        expected = features.mean(0) @ matrix.numpy().T
    else:
        prefix = "momentum_enc." if name == "cobra-ii" else ""
        tensors = {f"{prefix}scale": torch.full((1,), 3.0)}
        if prefix:
            tensors |= {
                "momentum_enc.proj.weight": torch.zeros(2),
                "base_enc.scale": torch.zeros(1),
            }
        torch.save({"state_dict": tensors}, weights / preset.files[0])
        expected = 3 * features.min(0)
    encoder = describe_named_slide_encoder(f"{name}@{weights}", trust_remote_code=True)
    try:
        found = encoder.vector(encoder.open(CPU), features, coords, 512, "s")
    finally:
        for module in [m for m in sys.modules if m.split(".")[0] in ("madeleine", "cobra")]:
            del sys.modules[module]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if name in ("titan", "prism"):
        save_file({"other": torch.zeros(1)}, weights / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="scale"):
            encoder.open(CPU)


RIGHT = TileOrigin("chief-ctp", 256, 1.0)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (
            TileOrigin("uni", 256, 1.0),
            "features of uni, 256 px at 1 µm .* chief-ctp, 256 px at 1 µm",
        ),
        (TileOrigin("chief-ctp", 512, 1.0), "chief-ctp, 512 px .* trained on chief-ctp, 256 px"),
        (TileOrigin("chief-ctp", 256, 0.5), "256 px at 0.5 µm .* 256 px at 1 µm"),
        (TileOrigin("", 256, 1.0), "does not say its encoder: state it"),
        (TileOrigin("chief-ctp"), "does not say its patch_px, mpp: state it"),
        (TileOrigin("", 256, 0.5), "an unknown encoder, 256 px at 0.5 .* compute features"),
    ],
)
def test_features_of_another_origin_are_refused(origin: TileOrigin, message: str) -> None:
    check_origin(get_slide_preset("chief"), RIGHT, "s")
    check_origin(get_slide_preset("mean"), origin, "s")
    with pytest.raises(OriginError, match=message):
        check_origin(get_slide_preset("chief"), origin, "s")


def write_trident(path: Path, features: np.ndarray, coords: np.ndarray, encoder: str,
                  magnification: int = 10) -> None:  # fmt: skip
    """Writes features with the datasets and attributes of TRIDENT's `save_h5`."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features).attrs.update(
            {"name": path.stem, "savetodir": "", "encoder": encoder}
        )
        file.create_dataset("coords", data=coords).attrs.update(
            {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 20,
             "target_magnification": magnification, "overlap": 0, "name": path.stem}
        )  # fmt: skip


def test_what_files_say(tmp_path: Path) -> None:
    features, coords = bag_of(768)
    write_trident(tmp_path / "t.h5", features, coords, "ctranspath")
    assert origin_of_file(read_feature_file(tmp_path / "t.h5")) == RIGHT  # CHIEF's weights
    ours = {"encoder_name": "uni2-h@/w.bin", "encoder_digest": "ab", "mpp": 0.5, "patch_size": 256,
            "patch_size_level0": 256, "mpp_level0": 0.5}  # fmt: skip
    write_features(tmp_path / "o.h5", features, coords, encoder="uni2-h_ab", attributes=ours)
    origin = origin_of_file(read_feature_file(tmp_path / "o.h5"))
    assert origin == TileOrigin("uni2-h", 256, 0.5, "ab")
    write_features(tmp_path / "n.h5", features, coords, encoder="weights-1234", attributes={})
    assert origin_of_file(read_feature_file(tmp_path / "n.h5")) == TileOrigin()
    completed = complete_origin(TileOrigin(patch_px=256), TileOrigin("uni", 256, 0.5), "s")
    assert completed == TileOrigin("uni", 256, 0.5, stated=("encoder", "mpp"))
    with pytest.raises(OriginError, match="says encoder uni2-h, but uni was stated"):
        complete_origin(origin, TileOrigin("uni"), "o.h5")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.main, ["encode-slides", *map(str, arguments), "--quiet"])


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Three slides of TRIDENT's, one of another encoder, and a damaged one."""
    folder = tmp_path / "features"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        write_trident(folder / f"{name}.h5", *bag_of(768, 7 + seed, seed), "ctranspath")
    write_trident(folder / "other.h5", *bag_of(1024, 5), "uni_v1", 20)
    (folder / "torn.h5").write_bytes((folder / "a.h5").read_bytes()[:700])
    published_weights("chief", tmp_path / "CHIEF_pretraining.pth")
    return folder


def test_command_on_slides(cohort: Path, tmp_path: Path) -> None:
    name = f"chief@{tmp_path / 'CHIEF_pretraining.pth'}"
    out = tmp_path / "out"
    for _ in range(2):  # the second run has nothing left to do
        result = run(cohort, "--slide-encoder", name, "--output", out, "--device", "cpu")
        assert result.exit_code == 3, result.output
    rows = {r["slide"]: r for r in map(json.loads, (out / "skipped.jsonl").open())}
    assert set(rows) == {"other", "torn"}
    assert "of uni_v1, those of most slides are of ctranspath" in rows["other"]["detail"]
    encoder = describe_named_slide_encoder(name)
    with np.load(out / "slide_embeddings.npz") as table:
        assert table["slides"].tolist() == ["a", "b", "c"]
        for seed, vector in enumerate(table["features"]):
            features, coords = bag_of(768, 7 + seed, seed)
            expected = encoder.vector(encoder.open(CPU), features, coords, 512, "s")
            assert np.array_equal(vector, expected)
    with h5py.File(out / f"slide_features/{encoder.folder}/a.h5") as file:
        found = dict(file["features"].attrs)
    assert found["slide_encoder"] == "chief" and found["weights_sha256"] == encoder.digest
    assert found["features_origin"] == "chief-ctp, 256 px at 1 µm per pixel"
    refused = run(cohort, "--slide-encoder", "mean", "--output", out)
    assert refused.exit_code == 1 and "begun with other settings" in refused.output


def test_command_on_files_that_do_not_say(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    features, coords = bag_of(768)
    write_features(folder / "a.h5", features, coords, encoder="weights-1234", attributes={})
    published_weights("chief", tmp_path / "CHIEF_pretraining.pth")
    name = f"chief@{tmp_path / 'CHIEF_pretraining.pth'}"
    silent = run(folder, "--slide-encoder", name, "--output", tmp_path / "silent")
    assert silent.exit_code == 3
    skipped = json.loads((tmp_path / "silent/skipped.jsonl").read_text())
    assert "does not say its encoder, patch_px, mpp: state it" in skipped["detail"]
    stated = ("--patch-encoder", "chief-ctp", "--patch-px", 256, "--mpp", 1)
    told = run(folder, "--slide-encoder", name, "--output", tmp_path / "told", *stated)
    assert told.exit_code == 0, told.output
    row = json.loads((tmp_path / "told/manifest.jsonl").read_text())
    assert row["stated"] == ["encoder", "patch_px", "mpp"]
    with h5py.File(tmp_path / "told" / row["slide_features"]) as file:
        assert file["features"].attrs["stated"] == "encoder, patch_px, mpp"


def test_command_on_features_of_two_widths(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    for name, width in (("a", 768), ("b", 768), ("c", 1024)):
        write_features(folder / f"{name}.h5", *bag_of(width), encoder="made-up")
    (folder / "._a.h5").write_text("metadata of macOS")
    out = tmp_path / "out"
    result = run(folder, "--slide-encoder", "mean", "--output", out, "--device", "cpu")
    assert result.exit_code == 3, result.output
    (row,) = map(json.loads, (out / "skipped.jsonl").open())
    assert row["slide"] == "c" and "of width 1024, those of most slides have" in row["detail"]
    with np.load(out / "slide_embeddings.npz") as table:
        assert table["slides"].tolist() == ["a", "b"] and table["features"].shape == (2, 768)


def test_command_on_patients(cohort: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("slide_id,case_id\na.svs,P1\nb.svs,P1\nc.svs,P2\ngone.svs,P2\ntorn,P3\n")
    out = tmp_path / "out"
    result = run(cohort, "--slide-encoder", "max", "--patients", table, "--output", out)
    assert result.exit_code == 3, result.output
    rows = {r["patient"]: r for r in map(json.loads, (out / "manifest.jsonl").open())}
    assert rows["P1"]["slides"] == ["a", "b"] and not rows["P1"]["incomplete"]
    assert "gone" in rows["P2"]["skipped_slides"] and rows["P2"]["incomplete"]
    assert rows["P3"]["state"] == "skipped"
    with np.load(out / "patient_embeddings.npz") as vectors:
        assert vectors["patients"].tolist() == ["P1", "P2"]
        both = np.concatenate([bag_of(768, 7, 0)[0], bag_of(768, 8, 1)[0]])
        assert np.array_equal(vectors["features"][0], both.max(0))
    assert "other.h5" in (out / "passed_over.jsonl").read_text()

    def stored() -> dict[str, int]:
        return {path.stem: path.stat().st_mtime_ns for path in out.rglob("P*.h5")}

    before = stored()
    write_trident(cohort / "a.h5", *bag_of(768, 7, 9), "ctranspath")  # of another scan
    run(cohort, "--slide-encoder", "max", "--patients", table, "--output", out)
    assert stored()["P1"] != before["P1"] and stored()["P2"] == before["P2"]
    with np.load(out / "patient_embeddings.npz") as vectors:
        both = np.concatenate([bag_of(768, 7, 9)[0], bag_of(768, 8, 1)[0]])
        assert np.array_equal(vectors["features"][0], both.max(0))
    for path in cohort.iterdir():
        path.write_bytes(b"torn")
    assert run(cohort, "--slide-encoder", "max", "--patients", table, "--output", out).exit_code
    assert not stored() and not (out / "patient_embeddings.npz").exists()


def test_patients_side_by_side(tmp_path: Path) -> None:
    features = np.zeros((2, 4), np.float32)
    coarse = Bag(features, np.array([[0, 0], [256, 256]]), 256, RIGHT)
    fine = Bag(features, np.array([[512, 0], [1024, 512]]), 512, RIGHT)
    joined = join_bags([coarse, fine], side_by_side=True)
    assert joined.size_level0 == 512
    assert joined.coords.tolist() == [[0, 0], [512, 512], [1536, 0], [2048, 512]]
    assert join_bags([coarse], side_by_side=True).coords.tolist() == coarse.coords.tolist()
    other = Bag(features, fine.coords, 512, TileOrigin("uni"))
    with pytest.raises(OriginError, match="of chief-ctp  and of uni"):
        join_bags([coarse, other], side_by_side=False)
    table = tmp_path / "patients.csv"
    for content, message in (
        ("slide,patient\na,P\na,Q\n", "slide a has patients P and Q"),
        ("slide,patient\na,\n", "line 2: slide or patient is empty"),
        ("name,patient\na,P\n", "columns name, patient; expected slide"),
        ("slide,patient\n", "no rows"),
        ('slide,patient\n"a,P\nb,P\n', "patients.csv:2: no CSV"),
    ):
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_patients(table)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_default_vector_does_not_depend_on_the_scanner(tmp_path: Path) -> None:
    """The same tissue at 20x and at 40x: same patches, level-0 pixels of half the size."""
    x, y = np.meshgrid(np.arange(6), np.arange(5))
    places = np.stack([x.ravel(), y.ravel()], 1).astype(np.int64)
    features = bag_of(384, len(places))[0]
    for name, size in (("s20", 256), ("s40", 512)):
        attributes = {"patch_size": 256, "patch_size_level0": size, "mpp": 0.5, "mpp_level0": 1.0}
        write_features(
            tmp_path / f"features/{name}.h5",
            features,
            places * size,
            encoder="prov-gigapath-flash",
            attributes=attributes,
        )
    table = tmp_path / "patients.csv"
    table.write_text("slide,patient\ns20,P\ns40,P\n")
    vectors = {}
    for preset in ("mean", "pipeline"):
        longnet = describe_slide_encoder("random", 384, preset=preset)
        encoder = NamedSlideEncoder("gigapath-flash", longnet=longnet)
        out = tmp_path / preset
        report = encode_slides(tmp_path / "features", out, encoder, device="cpu", progress=False)
        assert report.written == 2 and report.exit_code == 0
        with np.load(out / "slide_embeddings.npz") as found:
            vectors[preset] = found["features"]
    assert np.array_equal(*vectors["mean"])
    assert cosine(*vectors["pipeline"]) < 0.99
    # Two scans of one patient lie beside each other, in patches of one size.
    longnet = describe_slide_encoder("random", 384)
    encoder = NamedSlideEncoder("gigapath-flash", longnet=longnet)
    encode_slides(
        tmp_path / "features", tmp_path / "p", encoder, patients=table, device="cpu", progress=False
    )
    both = np.concatenate([places, places + np.array([6, 0])]) * 512
    expected = encoder.vector(
        encoder.open(CPU), np.concatenate([features, features]), both, 512, "P"
    )
    with np.load(tmp_path / "p/patient_embeddings.npz") as found:
        assert np.array_equal(found["features"][0], expected)


def test_list() -> None:
    result = CliRunner().invoke(cli.main, ["encode-slides", "--list"])
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.output.splitlines()] == list_slide_encoders()
    assert NamedSlideEncoder("mean").folder == "mean"
