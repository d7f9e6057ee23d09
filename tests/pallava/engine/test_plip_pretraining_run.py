"""`xtuner-add train` on the tiny PLIP config, from images to an encoder folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from pallava.modeling.folders import load_vision_encoder
from pallava.modeling.plip import published_names
from pallava.pairs import plain_resize
from pallava.skipping import SkipLog
from pathcore.exit_codes import EXIT_SKIPPED, EXIT_USAGE
from pathcore.images import load_image
from pathcore.weights import load_strict, read_state_dict
from tests.pallava.engine.tiny_run import run

CONFIGS = Path(__file__).parents[3] / "configs" / "pallava"
CONFIG = CONFIGS / "plip_pretraining_tiny.py"
INKS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 60, 190),
    "ochre": (220, 180, 40),
}
GROUNDS = {"pink": (240, 190, 210), "white": (245, 245, 245), "grey": (150, 150, 150)}
PATTERNS = ("dots", "stripes", "a ring")
NUM_IMAGES = 108

pytestmark = pytest.mark.slow


def draw(ink, ground, pattern, seed):
    y, x = np.mgrid[:80, :80]
    figure = {
        "dots": (x % 20 - 10) ** 2 + (y % 20 - 10) ** 2 < 25,
        "stripes": (x // 8) % 2 == 0,
        "a ring": abs(np.hypot(x - 40, y - 40) - 22) < 7,
    }[pattern]
    pixels = np.where(figure[..., None], INKS[ink], GROUNDS[ground])
    noise = np.random.default_rng(seed).normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures that a caption names, each caption three times, and one file that is no image."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "images").mkdir()
    kinds = [(ink, ground, pattern) for ink in INKS for ground in GROUNDS for pattern in PATTERNS]
    rows = []
    for index in range(NUM_IMAGES):
        ink, ground, pattern = kinds[index % len(kinds)]
        draw(ink, ground, pattern, index).save(folder / "images" / f"{index}.png")
        caption = f"{ink} {pattern} on a {ground} ground"
        rows.append({"id": f"s{index}", "image": f"{index}.png", "caption": caption})
    (folder / "images" / "broken.png").write_bytes(b"not an image")
    rows.append({"id": "broken", "image": "broken.png", "caption": "red dots on a white ground"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def train(data, work_dir, *arguments, options=(), processes=1, config=CONFIG):
    pairs = data / "pairs.jsonl"
    options = [
        f"train_dataloader.dataset.pairs_file={pairs}",
        f"train_dataloader.dataset.image_folder={data / 'images'}",
        *([f"model.tokenizer.pairs_file={pairs}"] if config == CONFIG else []),
        *options,
    ]
    words = ("train", config, "--work-dir", work_dir, "--seed", 0, *arguments)
    done = run(data, *words, "--cfg-options", *options, processes=processes)
    return done.returncode, done.stdout


def scalars(work_dir):
    (file,) = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1:]
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("run")
    code, output = train(data, work_dir)
    assert code == EXIT_SKIPPED, output[-4000:]
    return work_dir, output


def build_model(data, checkpoint):
    from pallava.engine.runtime import prepare_host

    prepare_host()
    from mmengine.config import Config

    from pallava.engine.plip_pretraining import PLIPPretraining

    options = Config.fromfile(CONFIG).model.to_dict()
    del options["type"]
    options["tokenizer"]["pairs_file"] = str(data / "pairs.jsonl")
    return PLIPPretraining(**options, pretrained_pth=checkpoint).eval()


def test_losses_fall(trained):
    rows = scalars(trained[0])
    first, last = rows[0], rows[-1]
    assert last["loss_ita"] < 0.7 * first["loss_ita"]
    assert last["loss_itm"] < 0.9 * first["loss_itm"]
    assert last["temperature"] < 0.07


def test_the_log_tells_samples_per_second(trained):
    from mmengine.config import Config

    batch_size = Config.fromfile(CONFIG).train_dataloader.batch_size
    for row in scalars(trained[0]):
        assert row["samples_per_s"] == pytest.approx(batch_size / row["time"], rel=0.01)


def test_the_broken_image_is_recorded(trained):
    (log,) = trained[0].glob("*/skipped_samples.jsonl")
    (skipped,) = SkipLog(log).read()
    assert skipped.id == "broken"
    assert "1 sample" in trained[1]


def test_images_find_their_captions(trained, data):
    model = build_model(data, trained[0] / "epoch_60.pth")
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["id"] != "broken"]
    captions = sorted({row["caption"] for row in rows})
    resize = plain_resize(64)
    images = [resize(load_image(data / "images" / row["image"])) for row in rows]
    with torch.no_grad():
        image_feats = model.encode_image(model.normalise(torch.stack(images)))
        text_feats = model.encode_text(**model.tokenise(captions))
    nearest = (image_feats @ text_feats.T).argmax(dim=1).tolist()
    hits = sum(captions[n] == row["caption"] for n, row in zip(nearest, rows, strict=True))
    # Chance is 1 in 36.
    assert hits / len(rows) > 0.7


def test_the_encoder_folder_is_what_stage_one_and_transformers_load(trained):
    folder = trained[0] / "plip_encoder"
    encoder = load_vision_encoder(folder).eval()
    clip = CLIPVisionModel.from_pretrained(folder).eval()
    assert json.loads((folder / "preprocessor_config.json").read_text())["crop_size"] == {
        "height": 64,
        "width": 64,
    }
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = encoder(pixels, output_hidden_states=True).hidden_states
        expected = clip(pixels, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    weights = published_names(read_state_dict(trained[0] / "epoch_60.pth"))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_the_checkpoint_loads_without_mmengine(trained, data):
    from pallava.plip.initialisation import (
        ENC_TOKEN,
        build_caption_tokenizer,
        build_text_encoder,
        build_vision_encoder,
    )
    from pallava.plip.pretraining import PLIPPretrainingModel

    options = build_model(data, None)
    tokenizer = build_caption_tokenizer({"pairs_file": data / "pairs.jsonl", "vocab_size": 2000})
    model = PLIPPretrainingModel(
        build_vision_encoder(options.visual_encoder.config.to_dict()),
        build_text_encoder(
            options.text_encoder.config.to_dict(), vocab_size=len(tokenizer), image_hidden_size=128
        ),
        enc_token_id=tokenizer.convert_tokens_to_ids(ENC_TOKEN),
        embed_dim=64,
        queue_size=256,
    )
    weights = read_state_dict(trained[0] / "epoch_60.pth")
    load_strict(model, weights, what="PLIP")
    assert model.idx_queue.min() >= 0


def test_resume_goes_on_where_it_stopped(trained, data, tmp_path):
    checkpoint = trained[0] / "epoch_60.pth"
    code, output = train(
        data, tmp_path, "--resume", str(checkpoint), options=["train_cfg.max_epochs=61"]
    )
    assert code in (0, EXIT_SKIPPED), output[-4000:]
    rows = scalars(tmp_path)
    assert rows[-1]["epoch"] == 61
    assert rows[-1]["loss_ita"] < 1.2 * scalars(trained[0])[-1]["loss_ita"]
    before = read_state_dict(checkpoint)
    after = load_file(tmp_path / "plip_encoder" / "model.safetensors")
    name = "vision_model.embeddings.class_embedding"
    moved = (after[name] - before[f"visual_encoder.{name}"]).abs().max()
    assert 0 < moved < 0.01


def test_resume_with_a_vocabulary_of_other_captions_is_refused(trained, data, tmp_path):
    rows = (data / "pairs.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(rows.replace("dots", "tods"))
    code, output = train(
        data,
        tmp_path / "run",
        "--resume",
        str(trained[0] / "epoch_60.pth"),
        options=[f"model.tokenizer.pairs_file={tmp_path / 'other.jsonl'}"],
    )
    assert code == EXIT_USAGE, output[-4000:]
    assert "trained with another vocabulary" in output
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.multiproc
def test_two_processes(data, tmp_path):
    options = ["train_cfg.max_epochs=2", "default_hooks.checkpoint.interval=1"]
    options += ["train_dataloader.batch_size=8", "train_dataloader.num_workers=1"]
    code, output = train(
        data, tmp_path, options=[*options, "model.gather_negatives=True"], processes=2
    )
    assert code in (0, EXIT_SKIPPED), output[-4000:]
    assert [row["epoch"] for row in scalars(tmp_path)] == [1, 2]
    weights = read_state_dict(tmp_path / "epoch_2.pth")
    # 2 epochs of 6 steps of 16 pairs of both ranks.
    assert weights["ptr_queue"].item() == 192
    assert (weights["idx_queue"] >= 0).sum() == 192
    assert (tmp_path / "plip_encoder" / "config.json").is_file()


def test_the_full_recipe_starts_from_clip_and_bert_folders(data, tmp_path):
    from transformers import BertConfig, BertModel, CLIPVisionConfig

    from pallava.plip.initialisation import build_caption_tokenizer

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    clip = CLIPVisionModel(vision)
    clip.save_pretrained(tmp_path / "clip")
    tokenizer = build_caption_tokenizer({"pairs_file": data / "pairs.jsonl"})
    tokenizer.save_pretrained(tmp_path / "bert")
    BertModel(BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")

    code, output = train(
        data,
        tmp_path / "run",
        config=CONFIGS / "plip_pretraining.py",
        options=[
            f"model.visual_encoder={tmp_path / 'clip'}",
            f"model.text_encoder={tmp_path / 'bert'}",
            "model.queue_size=50",
            "train_dataloader.dataset.image_size=32",
            "train_dataloader.batch_size=8",
            "train_dataloader.num_workers=1",
            "train_cfg.max_epochs=1",
        ],
    )
    assert code in (0, EXIT_SKIPPED), output[-4000:]
    weights = read_state_dict(tmp_path / "run" / "epoch_1.pth")
    assert weights["image_queue"].shape == (256, 50)
    trained = load_file(tmp_path / "run" / "plip_encoder" / "model.safetensors")
    start = clip.state_dict()
    for name in ("class_embedding", "patch_embedding.weight"):
        name = f"vision_model.embeddings.{name}"
        moved = (trained[name] - start[name]).abs().max()
        # 13 steps of at most 1e-4 from where CLIP stood.
        assert 0 < moved < 13 * 1.5e-4
