"""Stores the text embeddings of classes in a file, so that training needs no text model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cite.text_encoder import TextEncoder
from pathcore.files import StrPath, atomic_file

_KEY = "cite"
_SHOWN = 60


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of texts that describe classes.

    Attributes:
        embeddings: float `(num_texts, dim)`, as the encoder returns them.
        class_ids: int64 `(num_texts,)`, indices into `classes`.
        classes: Names of the classes, in the order of their labels.
        texts: The texts.
        encoder: Description of the text encoder, as JSON values.
        source: Name of the file, for error messages.

    Raises:
        ValueError: If lengths differ, embeddings are not finite, or a class has no text.
    """

    embeddings: Tensor
    class_ids: Tensor
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    encoder: Mapping[str, Any] = field(default_factory=dict)
    source: str = "text embeddings"

    def __post_init__(self) -> None:
        rows = self.embeddings.shape[0] if self.embeddings.dim() == 2 else -1
        if not rows == len(self.class_ids) == len(self.texts):
            raise ValueError(
                f"{self.source}: embeddings of shape {tuple(self.embeddings.shape)}, "
                f"{len(self.class_ids)} class numbers and {len(self.texts)} texts; one row each "
                "expected"
            )
        if not torch.isfinite(self.embeddings).all():
            raise ValueError(f"{self.source}: embeddings hold values that are not finite")
        found = set(self.class_ids.tolist())
        if found != set(range(len(self.classes))):
            raise ValueError(
                f"{self.source}: texts of classes {sorted(found)}, but there are "
                f"{len(self.classes)} classes; each needs a text"
            )

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.embeddings.shape[1]


def texts_by_class(
    descriptions: Mapping[str, str | Sequence[str]], templates: Sequence[str] = ("{}",)
) -> tuple[list[str], list[int]]:
    """Inserts each description of each class into each template.

    Args:
        descriptions: One or more descriptions of each class by name.
        templates: Texts with one `{}` each.

    Returns:
        The texts, and the class index of each.

    Raises:
        ValueError: If a template does not have exactly one `{}`, or a class has no description.

    Example:
        >>> texts_by_class({"tumour": ["cancer", "neoplasm"]}, ["an image of {}."])
        (['an image of cancer.', 'an image of neoplasm.'], [0, 0])
    """
    texts: list[str] = []
    class_ids: list[int] = []
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r}: expected one {{}}")
    for index, (name, given) in enumerate(descriptions.items()):
        several: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        if not several or not all(isinstance(text, str) and text.strip() for text in several):
            raise ValueError(
                f"class {name!r}: expected a description or a list of them, none empty, found "
                f"{given!r:.80}"
            )
        filled = [template.replace("{}", text) for text in several for template in templates]
        texts += filled
        class_ids += [index] * len(filled)
    return texts, class_ids


def encode_texts(
    encoder: TextEncoder,
    descriptions: Mapping[str, str | Sequence[str]],
    templates: Sequence[str] = ("{}",),
) -> TextEmbeddings:
    """Encodes the descriptions of classes, inserted into each template.

    Args:
        encoder: Text encoder, for example from `cite.text_encoder.build_text_encoder`.
        descriptions: One or more descriptions of each class by name.
        templates: Texts with one `{}` each.

    Raises:
        ValueError: If a template does not have exactly one `{}`, or a class has no description.

    Example:
        >>> class Lengths:
        ...     description = {"type": "lengths"}
        ...     def encode(self, texts):
        ...         return torch.tensor([[float(len(text))] for text in texts])
        >>> found = encode_texts(Lengths(), {"tumour": ["cancer", "neoplasm"], "stroma": "stroma"})
        >>> found.classes, found.class_ids.tolist(), found.embeddings.shape
        (('tumour', 'stroma'), [0, 0, 1], torch.Size([3, 1]))
    """
    texts, class_ids = texts_by_class(descriptions, templates)
    return TextEmbeddings(
        encoder.encode(texts).detach().float().cpu(),
        torch.tensor(class_ids),
        tuple(descriptions),
        tuple(texts),
        encoder.description,
    )


def write_text_embeddings(path: StrPath, content: TextEmbeddings) -> None:
    """Writes embeddings as safetensors, with a description in the header."""
    embeddings = content.embeddings.contiguous()
    header = {
        "classes": content.classes,
        "texts": content.texts,
        "encoder": dict(content.encoder),
        "digest": _digest_embeddings(embeddings),
    }
    tensors = {"text_embeddings": embeddings, "class_ids": content.class_ids}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata={_KEY: json.dumps(header, ensure_ascii=False)})


def read_text_embeddings(
    path: StrPath,
    *,
    classes: Sequence[str] | None = None,
    width: int | None = None,
) -> TextEmbeddings:
    """Reads a file that `write_text_embeddings` wrote.

    Args:
        path: The file.
        classes: Expected names of the classes, in order; by default any.
        width: Expected width of the embeddings; by default any.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is another kind of file, damaged, or has other classes or another width.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"text embeddings {path}: no such file; write it with `xtuner-add cite-texts`"
        )
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            embeddings, class_ids = (file.get_tensor(k) for k in ("text_embeddings", "class_ids"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"text embeddings {path}: not a file of `xtuner-add cite-texts` ({error})"
        ) from error
    if _digest_embeddings(embeddings) != header.get("digest"):
        raise ValueError(f"text embeddings {path}: damaged, the digest differs; write it again")
    content = TextEmbeddings(
        embeddings,
        class_ids,
        tuple(header["classes"]),
        tuple(header["texts"]),
        header["encoder"],
        str(path),
    )
    check_text_embeddings(content, classes=classes, width=width)
    return content


def check_text_embeddings(
    content: TextEmbeddings, *, classes: Sequence[str] | None = None, width: int | None = None
) -> None:
    """Checks that embeddings have the classes and the width that a model expects.

    Raises:
        ValueError: If classes, their order, or the width differ.
    """
    source = content.source
    if classes is not None and len(classes) != len(content.classes):
        raise ValueError(
            f"{source}: has {len(content.classes)} classes, the model has {len(classes)}: "
            f"{_shorten(content.classes)} and {_shorten(classes)}"
        )
    if classes is not None and tuple(classes) != content.classes:
        raise ValueError(
            f"{source}: its classes are {_shorten(content.classes)}, the model's "
            f"{_shorten(classes)}; names and order must agree"
        )
    if width is not None and width != content.width:
        raise ValueError(
            f"{source}: embeddings of width {content.width}, the model's features have {width}; "
            "use another text encoder, or another out_features of the neck"
        )


def _digest_embeddings(embeddings: Tensor) -> str:
    return sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()


def _shorten(classes: Sequence[str]) -> str:
    text = ", ".join(repr(name) for name in classes)
    return text if len(text) <= 4 * _SHOWN else f"{text[: 4 * _SHOWN]} ..."
