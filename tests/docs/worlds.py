"""Tiny inputs under the names that the documents use, one folder for each group of documents."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.cite.mm.gastric import make_gastric
from tests.gigapath import slide_cohort
from tests.gigapath.tiny_encoders import write_tile_encoder
from tests.pallava.converters import published
from tests.pallava.engine import tiny_run
from tests.pallava.evaluation.tiny_benchmark import make_data
from tests.pallava.tiny_folders import make_folders
from tests.pallava.tiny_vlms import write_llava
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import Slide
from wsi.store import write_coordinates, write_features
from wsi.tiling import PatchSpec, tile

TESTS = Path(__file__).parents[1]
SLIDES = ("TCGA.A", "TCGA.B")


def slides(root: Path) -> None:
    """Two slides, annotations of them, and a slide on its own."""
    for number, name in enumerate(SLIDES):
        write_svs(root / "slides" / f"{name}.svs", tissue_pixels(1500, 1500, seed=number), mpp=0.25)
    shutil.copyfile(root / "slides/TCGA.A.svs", root / "slide.svs")
    rows = [
        {"wsi_id": name, "position": ["100", "200"], "caption": "Glands in a fibrous stroma."}
        for name in SLIDES
    ]
    (root / "PathGen-1.6M.json").write_text(json.dumps(rows))
    head = "id\tfilename\tmd5\tsize\tstate\n"
    lines = [f"u{number}\t{name}.svs\tm\t1\treleased\n" for number, name in enumerate(SLIDES)]
    (root / "all_slides.txt").write_text(head + "".join(lines))


def selection(root: Path) -> None:
    """Patches with notes."""
    (root / "patches").mkdir()
    (root / "chosen").mkdir()
    rows = []
    for number in range(3):
        Image.new("RGB", (16, 16), (60 * number, 80, 120)).save(root / f"patches/{number}.png")
        rows.append({"id": f"p{number}", "image": f"{number}.png", "caption": f"case {number}"})
    published.write_lines(root / "chosen/selection.jsonl", rows)


def selecting(root: Path) -> None:
    """What selection of patches reads beside slides."""
    save_open_clip(root / "open_clip")
    (root / "types.json").write_text(json.dumps(dict.fromkeys(SLIDES, "BRCA")))
    rows = [{"wsi_id": name, "report": "Invasive carcinoma."} for name in SLIDES]
    published.write_lines(root / "reports.jsonl", rows)


def encoders(root: Path) -> None:
    """A tile encoder and a slide encoder in the released layout."""
    import torch

    from gigapath import slide_encoder

    arch = "tiny_slide_enc"
    slide_encoder.register_architecture(
        arch, embed_dim=32, depth=12, num_heads=4, segment_lengths=(8, 16, 32, 64, 128)
    )
    write_tile_encoder(root / "encoders")
    model = slide_encoder.create_model("", arch, 48)
    torch.save({"model": model.state_dict()}, root / "encoders/slide_encoder.pth")


def cohort(root: Path, features: str = "cohort_features") -> None:
    """Labelled slides with features."""
    folder, labels = slide_cohort.write_cohort(root / "cohort", 30)
    shutil.copyfile(labels, root / "cohort.csv")
    shutil.copytree(folder, root / features)
    slide_cohort.write_task(root / "task.yml")
    slide_cohort.write_task(root / "my_task.yml")


def training(root: Path) -> None:
    """What the tiny configs train on."""
    tiny_run.make_folder(root, num_images=20)  # warm-up takes two steps
    lines = (root / "data/tiny/conversations.jsonl").read_text().splitlines()
    kept = [line for line in lines if "absent.png" not in line]  # its test is test_training.py
    (root / "data/tiny/conversations.jsonl").write_text("\n".join(kept))


def images(root: Path) -> None:
    """Images under the names of the documents, and scores for a model card."""
    (root / "results/pathvqa").mkdir(parents=True)
    scores = {"PathVQA": {"closed accuracy": 0.5}}
    (root / "results/pathvqa/metrics.json").write_text(json.dumps(scores))
    (root / "more_images").mkdir()
    for number, name in enumerate(("biopsy.png", "a.png", "b.png", "more_images/c.png")):
        tiny_run.save_image(root / name, number)


def evaluation(root: Path) -> None:
    """A model in its folders, and benchmarks."""
    make_folders(root)
    shutil.copytree(root / "llama", root / "data/tiny/llama")
    write_llava(root / "hf_model")
    make_data(root / "pathvqa")
    shutil.copyfile(root / "pathvqa/test.json", root / "test.json")
    rows = json.loads((root / "test.json").read_text())
    answers = [{"question_id": name, "answer": row["answer"]} for name, row in rows.items()]
    (root / "pathvqa_result.json").write_text(json.dumps(answers))
    published.pmcvqa(root / "pmc_vqa")
    shutil.copyfile(root / "pmc_vqa/test_2.csv", root / "pmc_vqa/test.csv")
    published.bach(root / "BACH")


def datasets(root: Path) -> None:
    """Public data sets as published."""
    published.pmc_oa(root / "PMC_OA")
    published.quilt(root / "quilt")
    published.pathvqa(root / "PathVQA")
    published.pmcvqa(root / "PMC_VQA")
    tiny_run.make_folder(root, num_images=2)


def gastric(root: Path) -> None:
    """PatchGastric, and a text model."""
    make_gastric(root, size=64)
    shutil.copytree(TESTS / "golden/cite/tiny_bert", root / "tiny_bert")
    (root / "classes.json").write_text(json.dumps({"well": "Well", "poor": ["Poorly"]}))


def clip(root: Path) -> None:
    """CLIP folders, and labelled images."""
    save_hugging_face(root / "tiny_clip")
    shutil.copytree(root / "tiny_clip", root / "runs/clip/clean_pairs/hf")
    shutil.copytree(root / "tiny_clip", root / "runs/clip/clean_pairs/open_clip")
    generator = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)).save(path)

    for name in ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"):
        picture(root / f"CRC-VAL-HE-7K/{name}/1.png")
    picture(root / "MHIST/images/a.png")
    picture(root / "MHIST/images/b.png")
    (root / "MHIST/annotations.csv").write_text(
        "Image Name,Majority Vote Label,Partition\na.png,HP,test\nb.png,SSA,test\n"
    )
    rows = []
    for number in range(3):
        picture(root / f"test/{number}.png")
        rows.append({"id": str(number), "image": f"{number}.png", "caption": f"case {number}"})
    published.write_lines(root / "test/pairs.jsonl", rows)


def labelled_images(root: Path) -> None:
    """Images to train on, tables of labels and splits, and a slide with coordinates."""
    generator = np.random.default_rng(1)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)).save(path)

    for name in ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"):
        for number in range(2):
            picture(root / f"NCT-CRC-HE-100K/{name}/{number}.png")
    tiles, slides = [], []
    for number in range(12):
        picture(root / f"tiles/{number}.png")
        label, split = "ab"[number % 2], ("train", "val", "test")[number // 2 % 3]
        tiles.append({"input": f"{number}.png", "label": label, "split": split})
        split = "train" if number < 8 else "test"
        slides.append({"input": f"S{number:03d}", "label": label, "split": split})
    (root / "coords").mkdir()
    path = write_svs(root / "slides/A.svs", tissue_pixels(512, 512, seed=0))
    with Slide(path) as slide:
        write_coordinates(root / "coords/A.h5", slide, tile(slide, PatchSpec(64, 0.5)))
    classes = [{"name": name, "prompts": [name]} for name in ("tumour", "normal")]
    (root / "subtypes.json").write_text(json.dumps({"name": "subtypes", "classes": classes}))
    slide_cohort.write_table(root / "subtypes.csv", [{"slide_id": "A", "label": "tumour"}])
    slide_cohort.write_table(root / "tiles.csv", tiles)
    slide_cohort.write_table(root / "slides.csv", slides)


def features(root: Path) -> None:
    """Feature files of another tool."""
    coords = np.array([[256 * column, 0] for column in range(8)])
    values = np.random.default_rng(0).normal(size=(8, 1024)).astype(np.float32)
    (root / "features/uni").mkdir(parents=True)
    size = {"patch_size": 256, "patch_size_level0": 256, "level0_width": 4096}
    write_features(root / "features/uni/S1.h5", values, coords, encoder="uni", attributes=size)


def labelled_tiles(root: Path) -> None:
    """Tile embeddings with labels, in the published layout."""
    import io
    import zipfile

    import torch

    generator, rows = torch.Generator().manual_seed(0), []
    with zipfile.ZipFile(root / "embeddings.zip", "w") as archive:
        for number in range(40):
            vector = torch.randn(8, generator=generator)
            vector[number % 2] += 4
            stream = io.BytesIO()
            torch.save(vector, stream)
            split = ("train", "train", "train", "val", "test")[number % 5]
            archive.writestr(f"pcam/{split}/t{number}.pt", stream.getvalue())
            rows.append({"input": f"t{number}", "label": number % 2, "split": split})
    slide_cohort.write_table(root / "tiles.csv", rows)


def gigapath_features(root: Path) -> None:
    """Features of labelled slides under the name that the document uses."""
    cohort(root)
    shutil.copytree(root / "cohort/features", root / "features/gigapath")
    rows = list(csv.DictReader((root / "cohort.csv").open()))
    survival = [{"OS_days": 30 + 7 * n, "OS_event": n % 3 > 0} for n in range(len(rows))]
    rows = [{**row, **own} for row, own in zip(rows, survival, strict=True)]
    slide_cohort.write_table(root / "labels.csv", rows)
    clam_splits(root / "splits")
    task = root / "patho_bench/bcnb/er"
    task.mkdir(parents=True)
    (task / "config.yaml").write_text(
        "task_col: er\nsample_col: slide_id\nlabel_dict: {0: negative, 1: positive}\n"
    )
    lines = ["case_id\tslide_id\ter\tfold_0"]
    lines += [f"C{n}\tS{n:03d}\t{n % 2}\t{'train' if n < 8 else 'test'}" for n in range(12)]
    (task / "k=all.tsv").write_text("\n".join(lines))


def mil(root: Path) -> None:
    """Labelled slides with features and CLAM's splits."""
    folder, labels = slide_cohort.write_cohort(root / "cohort", 12, classes=2)
    (root / "features").mkdir(exist_ok=True)
    shutil.copytree(folder, root / "features/my_encoder")
    shutil.copyfile(labels, root / "labels.csv")
    clam_splits(root / "splits/task_100")


def clam_splits(folder: Path) -> None:
    """A fold of twelve slides as CLAM writes it."""
    folder.mkdir(parents=True)
    lines = ["train,val,test"]
    lines += [f"S{n:03d},{f'S{n + 6:03d}' if n < 3 else ''},{f'S{n + 9:03d}' if n < 3 else ''}"
              for n in range(6)]  # fmt: skip
    (folder / "splits_0.csv").write_text("\n".join(lines) + "\n")


def quilt(root: Path) -> None:
    """QUILT-1M as published."""
    published.quilt(root / "quilt")


GROUPS: dict[str, tuple[tuple[str, ...], tuple[Callable[[Path], None], ...]]] = {
    "main road": (
        ("docs/pallava.md", "docs/release.md", "docs/use.md"),
        (slides, selection, training, encoders, cohort, images, quilt, gastric),
    ),
    "Python": (("docs/python.md",), (slides, selection, clip, gastric, images, evaluation)),
    "slides": (
        ("docs/quickstart.md", "docs/commands.md", "docs/slides.md", "docs/encoders.md"),
        (slides, features),
    ),
    "captions": (("docs/captions.md",), (slides, selecting)),
    "datasets": (("docs/datasets.md",), (datasets,)),
    "evaluation": (("docs/evaluation.md",), (evaluation, images)),
    "gigapath": (
        ("docs/gigapath.md", "docs/slide_questions.md"),
        (slides, encoders, labelled_tiles, gigapath_features),
    ),
    "CLIP": (("docs/pathgen_clip.md", "docs/encoder_scores.md"), (clip, mil, labelled_images)),
    "CITE": (("docs/cite.md", "docs/cite_runs.md", "configs/cite/gastric/README.md"), (gastric,)),
    "the rest": (
        (
            *("CONTRIBUTING.md", "docs/index.md", "docs/install.md", "docs/benchmarks.md"),
            *("docs/demo.md", "docs/reproduce.md", "docs/pallava_models.md"),
            *("docs/demo_pathgen.md", "docs/plip_pretraining.md"),
        ),
        (),
    ),
}
"""Documents that are run in one folder, in this order, and what the folder holds at first."""
