"""YAML recipes that inherit from each other through `_base_`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathcore.files import StrPath


def read_recipes(path: StrPath) -> list[dict[str, Any]]:
    """Reads a recipe and the recipes it inherits from.

    Args:
        path: A YAML file; its `_base_` is relative to it.

    Returns:
        The mappings without `_base_`, the recipe itself last.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is not YAML, not a mapping, or inherits from itself.
    """
    import yaml  # an extra that only recipes need

    contents: list[dict[str, Any]] = []
    seen: set[Path] = set()
    file: Path | None = Path(path)
    while file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"recipe {file}: no such file")
        if file.resolve() in seen:
            raise ValueError(f"recipe {file}: inherits from itself")
        seen.add(file.resolve())
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {file}: cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"recipe {file}: expected a mapping, found {content!r:.80}")
        file = file.parent / str(content.pop("_base_")) if "_base_" in content else None
        contents.insert(0, content)
    return contents
