"""Starts an embedding job repeatedly, kills it at random moments, and checks what it left.

Usage: python -m tests.gigapath.embedding_killer JOB_JSON.

A process that has imported everything forks one child a run, so that dozens of
kills cost no imports.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import timm  # noqa: F401

from gigapath.embed import job as embedding_job
from gigapath.embed.job import EmbeddingSettings, Placement, embed_slides
from gigapath.embed.slide_vectors import describe_slide_encoder
from gigapath.embed.tile_inference import describe_encoder
from gigapath.slide_encoder import register_architecture
from pathcore import files
from pathcore.files import folder_lock
from tests.killing import finishes, visible_digests
from wsi.tiling import PatchSpec

SLIDE_ARCH = "tiny_killed"
_MOST_KILLS = 60


def settings_of(job: dict[str, Any]) -> EmbeddingSettings:
    tile_encoder = describe_encoder(job["tile_encoder"])
    slide_encoder = describe_slide_encoder("random", 48, model_arch=SLIDE_ARCH, grid_px="tile")
    spec = PatchSpec(32, 0.5, min_tissue=0.1)
    return EmbeddingSettings(tile_encoder, slide_encoder, spec, batch_size=4, pictures=False)


def run(job: dict[str, Any], out: Path, kill_after_s: float | None) -> bool:
    """Embeds in a child; returns whether it finished."""

    def work() -> None:
        embed_slides(
            job["slides"],
            out,
            settings_of(job),
            Placement("cpu"),
            workers=job["workers"],
            progress=False,
        )

    return finishes(work, kill_after_s)


def main() -> None:
    job = json.loads(sys.argv[1])
    register_architecture(
        SLIDE_ARCH, embed_dim=32, depth=2, num_heads=4, segment_lengths=(8, 16, 32, 64, 128)
    )
    files._LOCK_PATIENCE_S = 60.0  # workers of a killed run may notice late on a busy machine
    # Parts of a few batches, so that many fall into a short run.
    embedding_job.PART_TILES = 8
    root = Path(job["root"])
    start = time.perf_counter()
    assert run(job, root / "whole", None)
    seconds = time.perf_counter() - start
    whole = visible_digests(root / "whole")
    generator, kills, with_parts = random.Random(job["seed"]), 0, 0
    out = root / "out"
    # On, until a kill has fallen between parts: how often one does is up to the machine.
    while kills < job["kills"] or (not with_parts and kills < _MOST_KILLS):
        kills += not run(job, out, generator.uniform(0.05, 1.0) * seconds)
        if (out / ".job").is_dir():
            with folder_lock(out / ".job" / "lock"):  # until the workers have noticed, too
                found = visible_digests(out)
                assert found.items() <= whole.items(), "a file that is not whole, or another"
                with_parts += any((out / ".job").rglob("*.npz"))
        if (out / "report.json").is_file():
            assert visible_digests(out) == whole, "a continued run gives other files"
            shutil.rmtree(out)
    assert run(job, out, None)
    assert visible_digests(out) == whole, "a continued run gives other files"
    assert not list((out / ".job").rglob("*.npz")), "parts are left"
    print("KILLS", kills, "WITH_PARTS", with_parts, "FILES", len(whole))


if __name__ == "__main__":
    main()
