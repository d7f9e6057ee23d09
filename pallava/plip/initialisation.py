"""Tokenizer and encoders of PLIP pretraining, pretrained or newly initialised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertTokenizerFast, CLIPVisionConfig

from pallava.modeling.folders import load_vision_encoder
from pallava.modeling.plip import PLIPVisionEncoder, published_names
from pallava.modeling.plip_text import PLIPTextEncoder
from pallava.pairs import read_captions
from pathcore.files import StrPath
from pathcore.weights import check_loading_report, load_strict

DEC_TOKEN, ENC_TOKEN = "[DEC]", "[ENC]"
"""Tokens that BLIP adds to BERT (arXiv:2201.12086) to start decoding and matching."""

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_caption_tokenizer(name_or_path: StrPath) -> BertTokenizerFast:
    """Loads a BERT tokenizer and adds `[DEC]` and `[ENC]`.

    Args:
        name_or_path: Folder of a BERT tokenizer, or name on the Hugging Face Hub.
    """
    return _add_tokens(BertTokenizerFast.from_pretrained(name_or_path))


def make_caption_tokenizer(captions: Iterable[str], vocab_size: int = 30522) -> BertTokenizerFast:
    """Builds a BERT tokenizer from the words of the captions, for training from scratch.

    Words are ordered by frequency, then alphabetically, so that every process builds the same
    tokenizer. Single letters spell words outside the vocabulary.

    Args:
        captions: Texts to take the words from.
        vocab_size: Maximum size of the vocabulary, without `[DEC]` and `[ENC]`.

    Raises:
        ValueError: If the captions contain no words, or the limit leaves no space for them.
    """
    from tokenizers.implementations import BertWordPieceTokenizer

    splitter = BertWordPieceTokenizer(lowercase=True)
    counts: Counter[str] = Counter()
    for caption in captions:
        normalised = splitter.normalizer.normalize_str(caption)
        counts.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normalised))
    if not counts:
        raise ValueError("captions: no words in them, a tokenizer cannot be made")
    letters = sorted({letter for word in counts for letter in word})
    pieces = [*_SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if len(pieces) >= vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size}: special tokens and letters alone take {len(pieces)}"
        )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = dict.fromkeys(pieces) | dict.fromkeys(words[: vocab_size - len(pieces)])
    wordpiece = BertWordPieceTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)}, lowercase=True
    )
    return _add_tokens(BertTokenizerFast(tokenizer_object=wordpiece._tokenizer))


def build_caption_tokenizer(spec: str | Mapping[str, Any]) -> BertTokenizerFast:
    """Loads a tokenizer, or builds one from the captions of a pairs file.

    Args:
        spec: Name or path, or `{"pairs_file": ..., "vocab_size": ...}`.
    """
    if isinstance(spec, Mapping):
        options = dict(spec)
        return make_caption_tokenizer(read_captions(options.pop("pairs_file")), **options)
    return load_caption_tokenizer(spec)


def build_vision_encoder(spec: StrPath | Mapping[str, Any]) -> PLIPVisionEncoder:
    """Loads a CLIP vision encoder from a folder or the Hub, or builds a new one.

    Args:
        spec: Folder of a CLIP or PLIP, name on the Hugging Face Hub, or `CLIPVisionConfig` fields.

    Raises:
        CheckpointError: If weights are missing or do not fit.
        FileNotFoundError: If `spec` is neither a folder nor a possible Hub name.
    """
    if isinstance(spec, Mapping):
        return PLIPVisionEncoder(CLIPVisionConfig(**spec))
    _check_name_or_path("visual_encoder", spec)
    if Path(spec).is_dir():
        return load_vision_encoder(spec)
    from transformers import CLIPVisionModel

    clip, report = CLIPVisionModel.from_pretrained(spec, output_loading_info=True)
    check_loading_report(report, clip, what="vision encoder", source=str(spec))
    encoder = PLIPVisionEncoder(clip.config)
    load_strict(
        encoder, published_names(clip.state_dict()), what="vision encoder", source=str(spec)
    )
    return encoder


def build_text_encoder(
    spec: StrPath | Mapping[str, Any], *, vocab_size: int, image_hidden_size: int
) -> PLIPTextEncoder:
    """Loads a text encoder from a BERT folder or the Hub, or builds a new one.

    Args:
        spec: Folder of a BERT, name on the Hugging Face Hub, or `BertConfig` fields.
        vocab_size: Number of tokens, including added ones.
        image_hidden_size: Width of the image encoder.

    Raises:
        FileNotFoundError: If `spec` is neither a folder nor a possible Hub name.
    """
    if isinstance(spec, Mapping):
        config = BertConfig(**{**spec, "vocab_size": vocab_size})
        return PLIPTextEncoder(config, image_hidden_size)
    _check_name_or_path("text_encoder", spec)
    return PLIPTextEncoder.from_bert(
        spec, vocab_size=vocab_size, image_hidden_size=image_hidden_size
    )


def _add_tokens(tokenizer: BertTokenizerFast) -> BertTokenizerFast:
    tokenizer.add_special_tokens({"bos_token": DEC_TOKEN})
    tokenizer.add_special_tokens({"additional_special_tokens": [ENC_TOKEN]})
    return tokenizer


def _check_name_or_path(what: str, spec: StrPath) -> None:
    """Distinguishes a missing folder from a Hub name before the Hub is contacted."""
    text = os.fspath(spec)
    if not Path(text).is_dir() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise FileNotFoundError(
            f"{what} {text}: no such folder; give the folder of a pretrained model, a name on the "
            "Hugging Face hub, or sizes to start from scratch"
        )
