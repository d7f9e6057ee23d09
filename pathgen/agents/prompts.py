"""Reads and checks prompts of agents, and fills them with the fields of a row.

A prompt file is JSON:

    {"system": "...", "user": ["paragraph", "paragraph with {caption}"], "reply": {...}}

`{field}` is replaced by that field of the row, and `{field:json}` by its JSON encoding, whose
quotes keep the text from posing as part of the prompt. A paragraph is omitted if the row lacks a
field that it names. `reply` is the JSON schema of the reply; without it the reply is plain text. A
`.txt` file holds the `user` part only, with blank lines between paragraphs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pathcore.files import StrPath
from pathcore.names import did_you_mean

_FIELD = re.compile(r"\{([A-Za-z_]\w*)(:json)?\}")
_ALIASES = {"description": "caption"}
"""PathGen's published prompt for descriptions calls the caption of a row `description`."""


@dataclass(frozen=True)
class Prompt:
    """Template of the messages to a model.

    Attributes:
        name: Name, for the provenance.
        system: System message; may be empty.
        paragraphs: Paragraphs of the user message.
        schema: JSON schema of the reply; None for plain text.
    """

    name: str
    system: str
    paragraphs: tuple[str, ...]
    schema: Mapping[str, Any] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of messages and schema, for the provenance."""
        content = [self.system, list(self.paragraphs), self.schema]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def fill(self, row: Mapping[str, Any]) -> str:
        """Returns the user message for one row.

        Raises:
            ValueError: If every paragraph names a field that the row lacks.
        """
        kept = [
            text for text in (_fill_paragraph(p, row) for p in self.paragraphs) if text is not None
        ]
        if not kept:
            raise ValueError(f"prompt {self.name!r}: the row has none of its fields")
        return "\n\n".join(kept)


def load_prompt(name_or_path: StrPath, *, reply_of: Prompt | None = None) -> Prompt:
    """Reads a prompt of this package by name, or a prompt file.

    Args:
        name_or_path: Name such as `describe`, or path of a `.json` or `.txt` file.
        reply_of: Prompt that supplies the schema of the reply if the file has none.

    Raises:
        FileNotFoundError: If there is no such prompt.
        ValueError: If the file is not a valid prompt.
    """
    path = Path(name_or_path)
    if path.suffix not in (".json", ".txt"):
        resource = files("pathgen.prompts") / f"{path.name}.json"
        if path.name != str(name_or_path) or not resource.is_file():
            known = (Path(other.name) for other in files("pathgen.prompts").iterdir())
            hint = did_you_mean(name_or_path, (p.stem for p in known if p.suffix == ".json"))
            raise FileNotFoundError(
                f"prompt {name_or_path}: neither a known name nor a .json or .txt file{hint}"
            )
        return _parse_prompt(path.name, resource.read_text(encoding="utf-8"))
    if not path.is_file():
        raise FileNotFoundError(f"prompt {path}: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        paragraphs = tuple(p.strip() for p in re.split(r"\n\s*\n", text) if p.strip())
        if not paragraphs:
            raise ValueError(f"prompt {path}: empty")
        prompt = Prompt(path.stem, "", paragraphs)
        return replace(prompt, schema=reply_of.schema) if reply_of else prompt
    prompt = _parse_prompt(path.stem, text)
    if reply_of is not None and prompt.schema is None:
        prompt = replace(prompt, schema=reply_of.schema)
    return prompt


def _parse_prompt(name: str, text: str) -> Prompt:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"prompt {name}: not valid JSON: {error}") from error
    if not isinstance(value, Mapping) or not set(value) <= {"system", "user", "reply"}:
        raise ValueError(f"prompt {name}: expected an object with system, user and reply")
    user = value.get("user")
    paragraphs = [user] if isinstance(user, str) else user
    if (
        not isinstance(paragraphs, Sequence)
        or not paragraphs
        or not all(isinstance(p, str) and p for p in paragraphs)
    ):
        raise ValueError(f"prompt {name}: user: expected a text or a list of paragraphs")
    schema = value.get("reply")
    if schema is not None:
        _check_schema(name, schema)
    return Prompt(name, str(value.get("system", "")), tuple(paragraphs), schema)


def _check_schema(name: str, schema: Any) -> None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"prompt {name}: reply is not a JSON schema: {error.message}") from error


def _fill_paragraph(paragraph: str, row: Mapping[str, Any]) -> str | None:
    """Fills a paragraph in one pass, so that braces in the row's own texts stay unchanged."""
    values = {}
    for field, _ in _FIELD.findall(paragraph):
        value = row.get(field, row.get(_ALIASES.get(field, field)))
        if value is None or value == "":
            return None
        values[field] = value
    return _FIELD.sub(
        lambda found: _field_text(values[found[1]], as_json=bool(found[2])), paragraph
    )


def _field_text(value: Any, *, as_json: bool) -> str:
    if as_json or not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value
