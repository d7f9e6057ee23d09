"""An exported model in 8 and 4 bits: smaller, close to the original, loaded like it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from pallava import load_model
from pallava.inference.assistant import Assistant
from pallava.release.export import export
from pallava.release.pth_to_hf import convert_checkpoint
from pallava.release.quantise import quantise
from pathcore.weights import CheckpointError
from tests.pallava.engine.tiny_run import save_image
from tests.pallava.goldens import CROSSATTN_STATE, TINY_LLAMA, tokenizer
from tests.pallava.release.exported import QUESTIONS, answer
from tests.pallava.release.test_pth_to_hf import recipe
from xtuner_add.cli import main


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantised")
    save = tokenizer().save_pretrained
    convert_checkpoint(CROSSATTN_STATE, recipe(root), root / "parts", save_tokenizer=save)
    export(TINY_LLAMA, root / "parts", root / "model", progress=False)
    return root / "model"


def first_logits(model: Assistant, image: Path) -> torch.Tensor:
    """Logits of the first token of an answer."""
    prompt = torch.tensor([model.encode(QUESTIONS[0], has_image=True)])
    inputs = model.model.prepare_inputs(prompt, [model.pixel_values(image)])
    with torch.no_grad():
        return model.model.llm(inputs_embeds=inputs.inputs_embeds).logits[0, -1]


def dtypes(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def small_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "safetensors" not in path.name}


@pytest.mark.parametrize(("bits", "stored"), [(8, "I8"), (4, "U8")])
def test_a_quantised_model_is_smaller_and_answers(
    exported: Path, bits: int, stored: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, image = tmp_path / "small", tmp_path / "image.png"
    save_image(image, 0)
    command = ["quantise", str(exported), str(out), "--bits", str(bits), "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "digests verified" in result.output
    found = dtypes(out)
    layer = "llm.model.layers.0.mlp.up_proj.weight"
    assert found[layer] == stored
    original = dtypes(exported)
    kept = [name for name in original if not name.startswith("llm.model.layers.")]
    assert {name: found[name] for name in kept} == {name: original[name] for name in kept}
    assert small_files(out) == small_files(exported)
    assert f"{bits} bits" in (out / "README.md").read_text()

    before, after = load_model(exported, device="cpu"), load_model(out, device="cpu")
    expected, logits = first_logits(before, image), first_logits(after, image)
    similarity = torch.nn.functional.cosine_similarity(expected, logits, dim=0)
    assert (0.999 if bits == 8 else 0.9) < similarity
    assert not torch.equal(expected, logits)
    assert after.prompt_template == before.prompt_template
    caplog.clear()
    assert after.answer(image, QUESTIONS[0], max_new_tokens=4)
    # bitsandbytes would warn at each layer.
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes.auto")]
    assert len(answer(str(out), [str(image)] * 3, "package")) == 3  # transformers' own classes


def test_only_an_exported_model_is_quantised_and_once(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type 'llama', expected a folder"):
        quantise(TINY_LLAMA, tmp_path / "out", bits=4, device="cpu")
    again = tmp_path / "again"
    shutil.copytree(exported, again)
    config = json.loads((again / "config.json").read_bytes())
    (again / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantise(again, tmp_path / "out", bits=4, device="cpu")
    assert not (tmp_path / "out").exists()
