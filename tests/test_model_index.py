"""The index names every full-size recipe, and only what is there."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_index_names_every_recipe() -> None:
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    listed = set()
    for file in index["Import"]:
        meta = yaml.safe_load((ROOT / file).read_text())
        collections = {collection["Name"] for collection in meta["Collections"]}
        for collection in meta["Collections"]:
            assert (ROOT / collection["README"]).is_file()
        for model in meta["Models"]:
            assert model["In Collection"] in collections
            listed.add(model["Config"])
    recipes = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("configs/**/*.py")
        if not path.stem.endswith("_tiny")
        and not path.stem.startswith("demo")
        and path.parent.name != "_base_"
    }
    assert listed == recipes
