"""A model that `xtuner-add serve` serves is a describer like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from pallava import load_model
from pallava.serving.app import create_app
from pallava.serving.guard import GuardSettings
from pallava.serving.service import ModelService
from pathcore.chat_backends import OpenAIBackend, Sampling
from pathgen.agents.captions import describe
from pathgen.agents.steps import run_step
from tests.pallava import goldens
from tests.pallava.serving.conftest import serving
from tests.pallava.tiny_folders import make_folders
from tests.pathgen.conftest import patch_rows, read_rows, write_rows

pytestmark = pytest.mark.slow


def test_describing_by_our_own_server(
    tmp_path: Path, patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    root = make_folders(tmp_path / "served", goldens.CROSSATTN_STATE)
    model = load_model(root / "llama", root / "llava", root / "plip", device="cpu")
    app = create_app(ModelService(model, "tiny"), GuardSettings(hosts=("127.0.0.1",)))
    source = write_rows(tmp_path / "rows.jsonl", patch_rows("a", "b"))
    out = tmp_path / "out.jsonl"
    with serving(app) as port:
        backend = OpenAIBackend(
            f"http://127.0.0.1:{port}/v1", "tiny", Sampling(16), concurrency=2, max_retries=0
        )
        prompt = tmp_path / "short.txt"  # the tiny model reads 512 tokens
        prompt.write_text("Describe it.")
        step = describe(prompt, min_words=1)
        report = run_step(step, backend, source, out, images=patches, progress=False)
        backend.close()
    # Random weights seldom end a reply within 16 tokens: cut-off replies are the model's fault.
    reasons = [row["reason"] for row in read_rows(report.skipped)]
    assert all("cut off" in reason for reason in reasons)
    assert report.counts["written"] + len(reasons) == 2
    assert report.spent.tokens > 2 * 16
