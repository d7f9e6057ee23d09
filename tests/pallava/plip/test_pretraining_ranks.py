import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.warm_python import run_module

GOLDEN = Path(__file__).parents[2] / "golden" / "pallava" / "plip_pretrain"

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]


def _run(output, gather_negatives):
    arguments = [str(GOLDEN), str(output), str(int(gather_negatives))]
    done = run_module(
        "tests.pallava.plip.pretraining_ranks", arguments, cwd=GOLDEN.parents[3], ranks=2
    )
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads((output / "found.json").read_text())
    queues = [load_file(output / f"queues_{rank}.safetensors") for rank in (0, 1)]
    return found, queues


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "expected.json").read_text()), load_file(GOLDEN / "io.safetensors")


def test_two_ranks_are_one_process_with_the_union_of_their_batches(tmp_path, golden):
    expected, io = golden
    found, queues = _run(tmp_path, gather_negatives=True)
    for name in ("loss_ita", "loss_itm"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)
    for name, value in queues[0].items():
        torch.testing.assert_close(value, queues[1][name], atol=0, rtol=0)
        torch.testing.assert_close(value, io[f"{name}_after"], atol=2e-6, rtol=0)


def test_the_contrastive_part_needs_no_gathered_images(tmp_path, golden):
    expected, io = golden
    found, queues = _run(tmp_path, gather_negatives=False)
    assert found["loss_ita"] == pytest.approx(expected["loss_ita"], abs=1e-5)
    # One pair on a rank has no negative there: matching sees the positive alone.
    assert found["loss_itm"] != pytest.approx(expected["loss_itm"], abs=1e-3)
    for name in ("text_proj", "vision_proj", "temp"):
        assert found["grad_norms"][name] == pytest.approx(expected["grad_norms"][name], rel=1e-4)
    torch.testing.assert_close(queues[1]["image_queue"], io["image_queue_after"], atol=2e-6, rtol=0)
