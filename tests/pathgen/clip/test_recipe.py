from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from pathgen.clip.export import model_config
from pathgen.clip.recipe import read_recipe, trainer_arguments

FOLDER = Path(__file__).resolve().parents[3] / "configs/pathgen"
RECIPES = sorted(FOLDER.glob("pathgen_clip*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert [stage.name for stage in recipe.stages] == ["all_pairs", "clean_pairs"]
    config = model_config(recipe.model)
    assert config["embed_dim"] and trainer_arguments(recipe.stages[0].options)
    if path.stem.endswith("_tiny"):
        assert path.with_name(path.name.replace("_tiny", "")) in RECIPES
    else:
        assert (recipe.model, recipe.pretrained) in open_clip.list_pretrained()


def test_the_demos_recipe_is_given_its_data(tmp_path: Path) -> None:
    path = FOLDER / "demo_clip.yml"
    with pytest.raises(ValueError, match="stage pairs: expected data"):
        read_recipe(path)
    recipe = read_recipe(path, data={"pairs": tmp_path})
    assert [stage.name for stage in recipe.stages] == ["pairs"]
    assert model_config(recipe.model)["embed_dim"]
    assert trainer_arguments(recipe.stages[0].options)


def recipe(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    return file


STAGE = "stages: [{name: a, data: d.jsonl}]\n"


def test_what_is_given_goes_before_what_the_recipe_says(tmp_path: Path) -> None:
    base = recipe(tmp_path, f"model: ViT-B-32\noptions: {{lr: 1, wd: 2}}\n{STAGE}")
    file = tmp_path / "own.yml"
    file.write_text("_base_: recipe.yml\noptions: {wd: 3, image_mean: [0, 0, 0]}\n")
    read = read_recipe(file, data={"a": tmp_path / "x"}, options={"lr": 5}, model="ViT-B-16")
    [stage] = read.stages
    assert stage.data == tmp_path / "x" and read.model == "ViT-B-16"
    assert stage.options == {"lr": 5, "wd": 3, "image_mean": [0, 0, 0]}
    assert trainer_arguments(
        {**stage.options, "local_loss": True, "grad_checkpointing": False}
    ) == [
        *("--lr", "5", "--wd", "3", "--image-mean", "0", "0", "0", "--local-loss"),
    ]
    assert read_recipe(base).stages[0].options == {"lr": 1, "wd": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: ViT-B-32\nstage: []\n", r"no field 'stage'; did you mean stages"),
        ("model: ViT-B-32\n", "at least one stage"),
        (STAGE, "model: expected a name or a JSON file"),
        (f"model: own.json\n{STAGE}", "no such file here or beside"),
        (f"model: ViT-B-32\npretrained: /none/x.pt\n{STAGE}", "no such checkpoint"),
        (f"model: ViT-B-32\noptions: {{learning_rate: 1}}\n{STAGE}", "it has no learning_rate"),
        (f"model: ViT-B-32\noptions: {{lr: fast}}\n{STAGE}", "invalid float"),
        (f"model: ViT-B-32\noptions: {{resume: x.pt}}\n{STAGE}", "set by the training itself"),
        (f"model: ViT-B-32\noptions: {{train_num_samples: 9}}\n{STAGE}", "dataset_resampled"),
        ("model: ViT-B-32\nstages: [{name: ../a, data: d}]\n", "is not allowed in a file name"),
        ("model: ViT-B-32\nstages: [{name: a, data: d}, {name: a, data: d}]\n", "different names"),
        ("_base_: recipe.yml\n", "inherits from itself"),
        ("model: [\n", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_recipe(recipe(tmp_path, text))


def test_stages_that_there_are_not(tmp_path: Path) -> None:
    file = recipe(tmp_path, f"model: ViT-B-32\n{STAGE}")
    with pytest.raises(ValueError, match=r"no stage 'b'; known: a"):
        read_recipe(file, data={"b": tmp_path})
