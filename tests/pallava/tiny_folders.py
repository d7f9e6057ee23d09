"""The recorded model, in the folders that users have."""

from __future__ import annotations

import shutil
from pathlib import Path

from pallava.modeling.folders import save_connector
from tests.pallava import goldens
from tests.pallava.engine.tiny_run import save_encoder


def make_folders(root: Path, checkpoint: Path = goldens.RELEASED_PTH) -> Path:
    """Writes `llama/`, `plip/` and `llava/` (adapter and connector) below `root`."""
    shutil.copytree(goldens.TINY_LLAMA, root / "llama")
    save_encoder(root / "plip")
    model = goldens.model(checkpoint)
    model.llm.save_pretrained(root / "llava" / "llm_adapter")
    save_connector(model.projector, root / "llava" / "projector")
    return root
