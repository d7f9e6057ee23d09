"""Compares merging LoRA into a random Llama with `xtuner convert merge`.

    python -m benchmarks.merge [--work-dir /scratch/merge] [--layers 8]

Writes a base model in bf16 (random weights, real shapes: width 4096, feed-forward 14336, 32 heads,
8 key-value heads, vocabulary 128,256) and a LoRA adapter of rank 128 on all seven linear layers, as
PA-LLaVA trains it; merges with both programs in turn; then doubles the layers and merges with ours
again, to show that memory does not grow. The floor copies the shards of the base model in chunks
and waits for the disk, as each program must at least. Without --work-dir all files are in memory
(/dev/shm) if it is large enough, so that the speed of the disk does not matter. Wall time is that
of the whole command, including imports. Peak memory is the peak resident set of the process
(`VmHWM`), which the child reports itself: it includes file pages that a program maps, but not the
page cache of the system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._processor import describe
from benchmarks._ratios import Ratio

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
RANK = 128
_LAYERS_PER_SHARD = 8
_MEASURE = (
    "import atexit, runpy, sys\n"
    "def peak():\n"
    "    line = next(l for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
    "    open(sys.argv[-1], 'w').write(line.split()[1])\n"
    "record = sys.argv.pop()\n"
    "atexit.register(lambda: (sys.argv.append(record), peak()))\n"
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
)


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns the shape of each linear layer of a block."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    return {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work-dir", type=Path, help="a new folder; default: in memory, if there is room"
    )
    parser.add_argument("--layers", type=int, default=8, help="of 32; doubled for the last run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-xtuner", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    config = LLAMA_3_8B
    if arguments.quick:
        config, arguments.layers, arguments.rounds = TINY, 2, 1
    work_dir = arguments.work_dir or choose_work_dir(arguments.layers)
    rows: list[dict[str, Any]] = []
    floors: list[float] = []
    if work_dir.exists():
        parser.error(f"--work-dir {work_dir}: exists; name a new folder, it is removed at the end")
    print(f"work_dir={work_dir}")
    try:
        base, adapter = make_model(work_dir, config, arguments.layers)
        for _ in range(arguments.rounds):
            for measure_one in [measure_ours, *[measure_xtuner][arguments.skip_xtuner :]]:
                rows.append(measure_one(work_dir, base, adapter, arguments.layers))
                print_row(rows[-1])
            floors.append(copy_s(base, work_dir / "copy"))
            print_row({"program": "floor", "wall_s": round(floors[-1], 1)})
        shutil.rmtree(work_dir)
        base, adapter = make_model(work_dir, config, 2 * arguments.layers)
        double = measure_ours(work_dir, base, adapter, 2 * arguments.layers)
        print_row(double)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    ratios = summarise(rows, floors, double)
    if arguments.json:
        arguments.json.write_text(json.dumps(ratios, indent=2))


def choose_work_dir(layers: int) -> Path:
    """Returns a folder in memory if base, output and XTuner's peak fit, else one on disk."""
    in_memory, model_bytes = Path("/dev/shm"), 2.1e9 + 0.44e9 * layers
    # Either twice the layers, read and written; or one model, read and written, plus XTuner's peak
    # of 1.6 times the model.
    needed_bytes = max(2 * (2.1e9 + 0.44e9 * 2 * layers), 3.6 * model_bytes)
    if in_memory.is_dir():
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable:")]
        free_bytes = min(int(line.split()[1]) * 1024, shutil.disk_usage(in_memory).free)
        if free_bytes > 1.05 * needed_bytes:
            return in_memory / "bench_merge"
    return Path("work_dirs/bench_merge")


def summarise(
    rows: list[dict[str, Any]], floors: list[float], double: dict[str, Any]
) -> list[dict[str, Any]]:
    """Prints medians of wall time and peak memory per program.

    Returns:
        XTuner's wall time and memory divided by ours, unless it was skipped.
    """
    print(describe())
    found = {
        program: {
            name: [row[name] for row in rows if row["program"] == program]
            for name in ("wall_s", "peak_gib")
        }
        for program in dict.fromkeys(row["program"] for row in rows)
    }
    for program, figures in found.items():
        print(program, "median", {n: statistics.median(values) for n, values in figures.items()})
    ours = next(iter(found.values()))
    print(f"wall time, ours over the floor: {Ratio.of(ours['wall_s'], floors):.1f}")
    print(f"peak with {double['layers']} layers: {double['peak_gib']} GiB")
    if len(found) == 1:
        return []
    theirs = list(found.values())[1]
    ratios = []
    for name, figure in (("wall time", "wall_s"), ("memory", "peak_gib")):
        ratio = Ratio.of(theirs[figure], ours[figure])
        print(f"{name}, XTuner's over ours: {ratio:.1f}")
        ratios.append({"name": name, "ratio": ratio.median, "range": ratio.limits})
    return ratios


def make_model(work_dir: Path, config: dict[str, Any], layers: int) -> tuple[Path, Path]:
    """Writes base model, tokenizer and adapter; returns their folders."""
    import torch
    from safetensors.torch import save_file

    base, adapter = work_dir / "base", work_dir / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator)

    def random(*shape: int, scale: float = 0.02) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        start = int(torch.randint(1 << 19, (), generator=generator))
        flat = noise[start : start + (1 << 19)].repeat(-(-numel // (1 << 19)))[:numel]
        return (flat * scale).to(torch.bfloat16).view(shape)

    width, vocabulary, shapes = config["hidden_size"], config["vocab_size"], linears(config)
    shard_names: dict[str, str] = {}
    num_shards = -(-layers // _LAYERS_PER_SHARD) + 1

    def save(tensors: dict[str, torch.Tensor], number: int) -> None:
        name = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, base / name, metadata={"format": "pt"})
        shard_names.update(dict.fromkeys(tensors, name))

    lora: dict[str, torch.Tensor] = {}
    for number in range(1, num_shards):
        tensors = {}
        first = (number - 1) * _LAYERS_PER_SHARD
        for layer in range(first, min(first + _LAYERS_PER_SHARD, layers)):
            prefix = f"model.layers.{layer}"
            for module, (rows, columns) in shapes.items():
                tensors[f"{prefix}.{module}.weight"] = random(rows, columns)
                name = f"base_model.model.{prefix}.{module}"
                lora[f"{name}.lora_A.weight"] = random(RANK, columns)
                lora[f"{name}.lora_B.weight"] = random(rows, RANK, scale=0.002)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save(tensors, number)
    tensors = {
        "model.embed_tokens.weight": random(vocabulary, width),
        "lm_head.weight": random(vocabulary, width),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    save(tensors, num_shards)
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": shard_names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    golden = Path(__file__).parents[1] / "tests/golden/pallava/model/tiny_llama"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden / name, base)
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    lora_config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    lora_config |= {"target_modules": [name.split(".")[1] for name in shapes]}
    (adapter / "adapter_config.json").write_text(json.dumps(lora_config))
    return base, adapter


def measure_ours(work_dir: Path, base: Path, adapter: Path, layers: int) -> dict[str, Any]:
    arguments = ["merge", base, adapter, work_dir / "ours", "--device", "cpu"]
    return measure("xtuner-add merge", "xtuner_add.cli", arguments, work_dir, layers)


def measure_xtuner(work_dir: Path, base: Path, adapter: Path, layers: int) -> dict[str, Any]:
    arguments = [base, adapter, work_dir / "theirs", "--device", "cpu", "--safe-serialization"]
    module = "xtuner.tools.model_converters.merge"
    return measure("xtuner convert merge", module, arguments, work_dir, layers)


def copy_s(base: Path, out: Path) -> float:
    """Copies the shards of a model, flushes them to disk and returns the seconds."""
    out.mkdir()
    start = time.perf_counter()
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb") as source, (out / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
            target.flush()
            os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def measure(
    name: str, module: str, arguments: list[object], work_dir: Path, layers: int
) -> dict[str, Any]:
    """Runs a module in a separate process; returns wall time and peak memory."""
    record = work_dir / "peak"
    command = [sys.executable, "-c", _MEASURE, module, *map(str, arguments), str(record)]
    model_bytes = sum(file.stat().st_size for file in (work_dir / "base").glob("*.safetensors"))
    for folder in ("ours", "theirs"):
        shutil.rmtree(work_dir / folder, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    result = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - start
    done = result.returncode == 0
    os.sync()  # so that writing back one program's pages does not slow the other
    if not done:
        print(result.stdout[-1000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
    return {
        "program": name,
        "layers": layers,
        "model_gb": round(model_bytes / 1e9, 2),
        "wall_s": round(wall, 1),
        "peak_gib": round(int(record.read_text()) / 2**20, 2) if record.is_file() else None,
        "exit_code": result.returncode,
    }


def print_row(row: dict[str, Any]) -> None:
    print(*(f"{name}={value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
