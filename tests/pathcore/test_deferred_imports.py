"""Imports of host libraries that are deferred: what they save, and that nothing else changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pathcore.deferred_imports import EAGER_VARIABLE


def run(code: str, **variables: str) -> str:
    """Runs Python code in a process in which imports are deferred; returns what it prints."""
    start = "from pathcore.deferred_imports import defer_imports\ndefer_imports()\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True, text=True, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STEP = """
import sys, torch, bitsandbytes
from torch.utils.checkpoint import checkpoint
torch.manual_seed(0)
layer = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
for _ in range(2):
    checkpoint(layer, torch.ones(2, 3), use_reentrant=False).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
has_compiler = "torch._dynamo.convert_frame" in sys.modules
print(has_compiler, layer.weight.flatten().tolist())
"""


def test_a_training_step_needs_no_compiler_and_gives_the_same_weights() -> None:
    deferred, eager = run(STEP), run(STEP, **{EAGER_VARIABLE: "1"})
    assert (deferred.split()[0], eager.split()[0]) == ("False", "True")
    assert deferred.split()[1:] == eager.split()[1:]


def test_garbage_is_collected_as_usual_once_nothing_more_is_imported() -> None:
    code = """
import gc
before = gc.get_threshold()
import torch
during = gc.get_threshold()
kept = [[] for _ in range(200_000)]
print(before[0] > 700, during == before, gc.get_threshold()[0], len(gc.callbacks))
"""
    assert run(code) == "True True 700 0"
    assert run(code, **{EAGER_VARIABLE: "1"}) == "False True 700 0"


def test_a_pool_collects_garbage_as_usual_from_its_first_task_on() -> None:
    code = """
import gc
from pathcore.pool import run_tasks
import torch
print(gc.get_threshold()[0] > 700, *run_tasks(lambda task: gc.get_threshold()[0], [0], workers=1))
"""
    assert run(code) == "True 700"


def test_dtensors_compute_as_ever_and_import_sympy_only_then() -> None:
    code = """
import sys, torch
from torch.distributed.tensor import Shard, _decompositions, distribute_tensor, init_device_mesh
from torch.nn.attention.flex_attention import create_block_mask
before = "sympy" in sys.modules
alone = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)
rows = distribute_tensor(torch.arange(8.0).view(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
product = (rows @ rows.T).full_tensor()
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, guard_or_false
print(before, "sympy" in sys.modules, product.sum().item(), guard_or_false(True),
      _decompositions.GuardOnDataDependentSymNode is GuardOnDataDependentSymNode,
      GuardOnDataDependentSymNode.__module__)
"""
    real = "True 400.0 True True torch.fx.experimental.symbolic_shapes"
    assert run(code) == f"False {real}"
    assert run(code, **{EAGER_VARIABLE: "1"}) == f"True {real}"


def test_transformers_finds_the_same_names() -> None:
    code = """
from hashlib import sha256
import transformers
from transformers.utils.import_utils import fetch__all__
structure = sorted(transformers._import_structure.items(), key=str)
names = {module: sorted(found) for module, found in structure}
texts = ("__all__ = ['a']", "x = 1", "#__all__", "1\\n__all__ = [\\n'a',\\n]")
found = [fetch__all__(text) for text in texts]
print(len(names), sha256(str(names).encode()).hexdigest(), found)
"""
    assert run(code) == run(code, **{EAGER_VARIABLE: "1"})


def test_the_compiler_is_the_real_one_once_it_is_used() -> None:
    printed = run(
        "import torch\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "torch.optim.SGD(layer.parameters(), lr=0.1).step()\n"
        "before = 'torch._dynamo.convert_frame' in __import__('sys').modules\n"
        "double = torch.compile(lambda x: x * 2, backend='eager')\n"
        "import torch._dynamo, torch._dynamo.utils\n"
        "print(before, double(torch.ones(2)).tolist(), type(torch._dynamo).__name__,\n"
        "      torch._dynamo.graph_break.__module__, len(torch._dynamo.__path__),\n"
        "      torch._dynamo.utils.counters['stats']['unique_graphs'])\n"
    )
    assert printed == "False [2.0, 2.0] module torch._dynamo.decorators 1 1"


def test_functions_kept_out_of_the_compiler_stay_out() -> None:
    printed = run(
        "import sys, torch, torch._dynamo\n"
        "@torch._dynamo.disable\n"
        "def inner(x):\n"
        "    return x + (2 if torch.compiler.is_compiling() else 1)\n"
        "first = inner(1)\n"
        "compiled = torch.compile(lambda x: inner(x) * 1, backend='eager')\n"
        "print(first, compiled(torch.zeros(1)).item())\n"
    )
    assert printed == "2 1.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_deepspeed_is_fitted_when_it_is_used() -> None:
    pytest.importorskip("deepspeed")
    printed = run(
        "import sys\n"
        "from pallava.engine.runtime import prepare_host\n"
        "prepare_host()\n"
        "import deepspeed\n"
        "before = 'deepspeed.ops' in sys.modules\n"
        "from deepspeed.runtime.fp16.onebit import OnebitAdam\n"
        "print(before, deepspeed.ops.__compatible_ops__.get('deepspeed_shm_comm'))\n"
    )
    assert printed.splitlines()[-1] == "False False"


def test_a_package_of_xtuner_gives_its_parts_alone_and_whole() -> None:
    pytest.importorskip("xtuner")
    printed = run(
        "import sys\n"
        "from xtuner.dataset.map_fns import llava_map_fn\n"
        "before = 'xtuner.dataset.refcoco_json' in sys.modules\n"
        "from xtuner.dataset import LLaVADataset\n"
        "import xtuner.dataset\n"
        "print(before, LLaVADataset.__name__, hasattr(xtuner.dataset, 'nothing'))\n"
    )
    assert printed.splitlines()[-1] == "False LLaVADataset False"


def test_a_visualizer_draws_although_it_starts_without_a_figure() -> None:
    pytest.importorskip("mmengine")
    printed = run(
        "import sys, numpy as np\n"
        "from mmengine.visualization import Visualizer\n"
        "board = Visualizer()\n"
        "before = 'matplotlib.figure' in sys.modules\n"
        "board.set_image(np.full((20, 30, 3), 200, np.uint8))\n"
        "board.draw_bboxes(np.array([2, 2, 9, 9]), edge_colors='r')\n"
        "image = board.get_image()\n"
        "print(before, image.shape, len(np.unique(image.reshape(-1, 3), axis=0)) > 1)\n"
    )
    assert printed.splitlines()[-1] == "False (20, 30, 3) True"


def test_losses_of_object_detectors_work_without_scipy_at_the_import() -> None:
    pytest.importorskip("scipy")
    printed = run(
        "import sys, numpy as np\n"
        "from transformers.loss import loss_for_object_detection as losses, loss_utils\n"
        "before = 'scipy.optimize' in sys.modules\n"
        "rows, columns = losses.linear_sum_assignment(np.array([[4.0, 1.0], [2.0, 9.0]]))\n"
        "print(before, columns.tolist(), 'scipy.optimize' in sys.modules)\n"
    )
    assert printed == "False [1, 0] True"
