"""`load_model` on the folders that users have gives the recorded answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pallava import load_model
from pallava.anyres import AnyRes
from pallava.inference.assistant import Assistant
from pallava.inference.loading import fingerprint
from pallava.modeling.folders import load_vision_encoder, save_vision_encoder
from pallava.text.templates import PROMPT_TEMPLATES, find_template
from pathcore.weights import CheckpointError
from tests.pallava import goldens
from tests.pallava.tiny_folders import make_folders

CASES = [
    case
    for case in goldens.read_json("generate/cases.json")
    if (goldens.GOLDEN / "anyres" / case["image"]).is_file()
]
BOS = {"double_bos_as_eval_tools": "double", "single_bos_as_training": "single"}
QUESTIONS = ["Is fibrosis shown?", "What?", "Describe the nuclei and the stroma in this image."]
IMAGES = ["sq_big.png", "tall_3.png", "strip_8.png"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("crossing"), goldens.CROSSATTN_STATE)


def load(root: Path, **changes: Any) -> Assistant:
    return load_model(root / "llama", root / "llava", root / "plip", device="cpu", **changes)


def picture(name: str) -> Path:
    return goldens.GOLDEN / "anyres" / name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['question_id']}.{case['bos']}")
def test_answers_are_the_recorded_ones(folders: Path, case: dict[str, Any]) -> None:
    model = load(folders, bos=BOS[case["bos"]])
    assert model.encode(case["question"], has_image=True) == case["input_ids"]
    answer = model.answer(picture(case["image"]), case["question"], max_new_tokens=12)
    expected = goldens.tokenizer().decode(case["generated_ids"], skip_special_tokens=True)
    assert answer == expected.strip()


@pytest.mark.parametrize("kind", ["folders", "crossing"])
def test_a_batch_answers_as_its_questions_do_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(kind))
    images: list[Any] = [*map(picture, IMAGES), None, Image.open(picture("small_sq.png"))]
    questions = [*QUESTIONS, "No image here?", "Red?"]
    together = model.answer_batch(images, questions, max_new_tokens=12)
    alone = [
        model.answer(image, text, max_new_tokens=12)
        for image, text in zip(images, questions, strict=True)
    ]
    assert together == alone
    assert len(set(alone)) > 2


def test_sub_images_are_prepared_only_for_a_connector_that_sees_them(
    folders: Path, crossing: Path
) -> None:
    image = picture("sq_big.png")
    assert len(load(folders).pixel_values(image)) == 1
    assert len(load(crossing).pixel_values(image)) > 1


def test_the_recorded_rule_for_grids_is_used(crossing: Path, tmp_path: Path) -> None:
    root = shutil.copytree(crossing, tmp_path / "recorded")
    image = Image.new("RGB", (9, 9), (255, 255, 255))
    published = load(root).pixel_values(image)
    (root / "llava" / "conversion.json").write_text(json.dumps({"ties": "largest_scale"}))
    largest = load(root).pixel_values(image)
    assert (published[1:] < 0).float().mean() > 0.7
    assert (largest[1:] > 0).all()


def test_images_are_padded_as_the_record_says(crossing: Path, tmp_path: Path) -> None:
    root = shutil.copytree(crossing, tmp_path / "recorded")
    (root / "llava" / "conversion.json").write_text(json.dumps({"pad_to_square": True}))
    image = Image.open(picture("tall_3.png")).convert("RGB")
    padded = load(root).pixel_values(image)
    assert torch.equal(padded, AnyRes(32, pad_to_square=True)(image))
    assert not torch.equal(padded[0], load(crossing).pixel_values(image)[0])


def test_a_model_of_thumbnails_is_asked_about_thumbnails(crossing: Path, tmp_path: Path) -> None:
    root = shutil.copytree(crossing, tmp_path / "recorded")
    (root / "llava" / "conversion.json").write_text(json.dumps({"sub_images": False}))
    image = Image.open(picture("tall_3.png")).convert("RGB")
    assert len(load(crossing).pixel_values(image)) > 1
    model = load(root)
    assert len(model.pixel_values(image)) == 1
    assert model.answer(image, "red?", max_new_tokens=4)


def test_the_recorded_template_is_used_and_another_one_is_reported(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(folders, tmp_path / "recorded")
    assert load(root).prompt_template == "llama3_chat"
    assert "does not record the prompt template" in caplog.text
    caplog.clear()
    fields = find_template("vicuna").fields()
    (root / "llava" / "conversion.json").write_text(json.dumps({"prompt_template": fields}))
    assert load(root).prompt_template == "vicuna"
    assert load(root, prompt_template="vicuna").prompt_template == "vicuna"
    assert not caplog.text
    chosen = load(root, prompt_template="llama3_chat")
    assert chosen.encode("What?", has_image=False) != load(root).encode("What?", has_image=False)
    assert "'llama3_chat' as requested; the model was trained with 'vicuna'" in caplog.text
    (root / "llava" / "conversion.json").write_text("[")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load(root)


def test_the_recorded_layer_is_used_and_another_one_is_reported(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(folders, tmp_path / "recorded")
    assert load(root).model.visual_select_layer == -2
    (root / "llava" / "conversion.json").write_text(json.dumps({"visual_select_layer": -1}))
    assert load(root).model.visual_select_layer == -1
    for same in (-1, len(load(root).model.visual_encoder.vision_model.encoder.layers)):
        assert load(root, visual_select_layer=same).model.visual_select_layer == same
    assert "hidden state" not in caplog.text
    assert load(root, visual_select_layer=-2).model.visual_select_layer == -2
    assert "hidden state -2 of the encoder as requested; it was trained with -1" in caplog.text


def test_a_merged_model_answers_as_base_and_adapter(folders: Path, tmp_path: Path) -> None:
    merged = goldens.model(goldens.RELEASED_PTH).llm.merge_and_unload()  # type: ignore[operator]
    place = tmp_path / "llava" / "merged"
    shutil.copytree(folders / "llava", tmp_path / "llava")
    merged.save_pretrained(place)
    goldens.tokenizer().save_pretrained(place)
    expected = load(folders).answer(picture("sq_big.png"), "What?", max_new_tokens=12)
    inside = load_model(place, tmp_path / "llava", folders / "plip", device="cpu")
    assert inside.answer(picture("sq_big.png"), "What?", max_new_tokens=12) == expected
    twice = load_model(place, tmp_path / "llava", folders / "plip", device="cpu", use_adapter=True)
    assert twice.answer(picture("sq_big.png"), "What?", max_new_tokens=12) != expected


def test_sampling_settings_of_a_chat_model_do_not_reach_generation(
    folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 5.0, "top_p": 0.99, "eos_token_id": [1, 4]})
    )
    chatty = load_model(tmp_path / "llama", folders / "llava", folders / "plip", device="cpu")
    plain = load(folders)
    for name, text in zip(IMAGES, QUESTIONS, strict=True):
        assert chatty.answer(picture(name), text, max_new_tokens=12) == plain.answer(
            picture(name), text, max_new_tokens=12
        )
    assert chatty.generation_kwargs()["eos_token_id"] == [1, 4]


def test_a_stop_word_the_vocabulary_lacks_ends_an_answer(folders: Path) -> None:
    model = load(folders, prompt_template="internlm_chat")
    assert model.generation_kwargs()["stop_strings"] == ["<eoa>"]
    assert model.answer(picture("sq_big.png"), "What?", max_new_tokens=4)
    ids = goldens.tokenizer().encode("yes<eoa>no", add_special_tokens=False)
    assert model.decode(ids) == "yes"


def test_the_tokenizers_own_template_gets_one_bos(folders: Path, tmp_path: Path) -> None:
    model = load(folders)
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>user<|end_header_id|>\n\n"
        "{{ m['content'] }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>"
        "{{ '\\n\\n' }}"
    )
    own = Assistant(model.model, model.tokenizer, model.anyres, "tokenizer")
    assert own.encode("Red?", has_image=True) == load(folders).encode("Red?", has_image=True)
    with pytest.raises(ValueError, match="carries no chat template"):
        load(folders, prompt_template="tokenizer")


def test_templates_are_xtuners() -> None:
    from xtuner.utils import PROMPT_TEMPLATE

    assert set(PROMPT_TEMPLATES) == set(PROMPT_TEMPLATE)
    for name, template in PROMPT_TEMPLATE.items():
        ours = find_template(name)
        assert ours.render("Why {x}?") == template["INSTRUCTION"].replace(
            "{input}", "Why {x}?"
        ).replace("{round}", "1")
        assert list(ours.stop_words) == template.get("STOP_WORDS", [])
    with pytest.raises(ValueError, match="did you mean llama3_chat"):
        find_template("lama3_chat")


def test_fingerprints_tell_weights_apart(folders: Path, crossing: Path, tmp_path: Path) -> None:
    parts = (folders / "llava" / "projector", folders / "plip", None)
    first = fingerprint(folders / "llama", *parts)
    copy = shutil.copytree(folders / "llama", tmp_path / "elsewhere")
    assert fingerprint(copy, *parts) == first
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copy, *parts) != first
    assert fingerprint(folders / "llama", crossing / "llava" / "projector", parts[1], None) != first


@pytest.mark.parametrize(
    "other",
    [
        {"ties": "largest_scale"},
        {"pad_to_square": True},
        {"sub_images": False},
        {"visual_select_layer": -1},
        {"prompt_template": {"INSTRUCTION": "Question: {input} Answer:"}},
        {"prompt_template": {"INSTRUCTION": "Q: {input} A:", "STOP_WORDS": ["Q:"]}},
    ],
    ids=str,
)
def test_settings_tell_answers_apart(crossing: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    root = shutil.copytree(crossing, tmp_path / "recorded")
    record = {"prompt_template": {"INSTRUCTION": "Q: {input} A:"}}

    def settings(**changes: Any) -> str:
        (root / "llava" / "conversion.json").write_text(json.dumps(record | changes))
        return json.dumps(load(root).settings)

    first = settings()
    assert settings() == first
    assert settings(**other) != first


def test_missing_parts_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--visual-encoder"):
        load_model(folders / "llama", folders / "llava")
    with pytest.raises(FileNotFoundError, match="no projector/ in it"):
        load_model(folders / "llama")
    with pytest.raises(FileNotFoundError, match=r"language model .*cannot be loaded"):
        load_model(tmp_path / "none", folders / "llava", folders / "plip", device="cpu")
    with pytest.raises(ValueError, match="dtype 'fp12'"):
        load(folders, dtype="fp12")


def test_the_encoder_may_be_named_though_the_folder_holds_it(folders: Path, tmp_path: Path) -> None:
    """The published command lines name it; `pth-to-hf` stores frozen encoders, too."""
    llava = shutil.copytree(folders / "llava", tmp_path / "llava")
    save_vision_encoder(load_vision_encoder(folders / "plip"), llava / "visual_encoder")
    named = load_model(folders / "llama", llava, folders / "plip", device="cpu")
    question = picture(IMAGES[0]), QUESTIONS[0]
    assert named.answer(*question) == load(folders).answer(*question)
    other = shutil.copytree(folders / "plip", tmp_path / "plip")
    tensors = load_file(other / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"are others; leave --visual-encoder out"):
        load_model(folders / "llama", llava, other, device="cpu")


def test_an_absent_language_model_is_named(folders: Path, tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "./absent", "a/b/c", "absent"):
        with pytest.raises(FileNotFoundError, match=rf"language model {name}: .*no such folder"):
            load_model(name, folders / "llava", folders / "plip", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in this folder"):
        load_model(tmp_path / "empty", folders / "llava", folders / "plip", device="cpu")
    with pytest.raises(FileNotFoundError, match="CLIPVisionConfig") as caught:
        load_model(folders / "plip", folders / "llava", folders / "plip", device="cpu")
    assert len(str(caught.value)) < 500


def test_code_of_a_folder_is_not_run_whatever_stdin_says(folders: Path, tmp_path: Path) -> None:
    """transformers asks "Do you wish to run the custom code? [y/N]" unless told not to."""
    model = shutil.copytree(folders / "llama", tmp_path / "llama")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = (
        "import sys\nfrom pallava import load_model\n"
        "try:\n    load_model(*sys.argv[1:], device='cpu')\n"
        "except FileNotFoundError as error:\n    print('REFUSED', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, (model, folders / "llava", folders / "plip"))],
        input="y\ny\ny\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "REFUSED" in result.stdout and "auto_map" in result.stdout, result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_language_model_without_its_head_is_refused(folders: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folders / "llama", tmp_path / "llama")
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_model(model, folders / "llava", folders / "plip", device="cpu")


def test_a_broken_adapter_is_refused(folders: Path, tmp_path: Path) -> None:
    llava = shutil.copytree(folders / "llava", tmp_path / "llava")
    file = llava / "llm_adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(dict(list(weights.items())[2:]), file)
    with pytest.raises(CheckpointError, match="2 missing"):
        load_model(folders / "llama", llava, folders / "plip", device="cpu")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folders / "llama", llava, folders / "plip", device="cpu")
    save_file({name: tensor[:1] for name, tensor in weights.items()}, file)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(folders / "llama", llava, folders / "plip", device="cpu")


def test_half_precision_loads_and_answers(folders: Path) -> None:
    model = load(folders, dtype="bf16")
    assert model.dtype == torch.bfloat16
    assert isinstance(model.answer(picture("sq_big.png"), "What?", max_new_tokens=3), str)
    assert load(folders, dtype="auto").dtype == torch.float32


def test_questions_and_images_must_agree(folders: Path) -> None:
    model = load(folders)
    with pytest.raises(ValueError, match="pass None"):
        model.answer_batch([None], [])
    with pytest.raises(ValueError, match=r"1 <image> mark\(s\) for 0 image"):
        model.answer(None, "<image>\nWhat?")


def test_an_exported_folder_answers_as_its_parts(crossing: Path, tmp_path: Path) -> None:
    from pallava.modeling.hf import (
        PALLaVAConfig,
        PALLaVAForConditionalGeneration,
        PALLaVAProcessor,
    )

    parts = load(crossing)
    llm = parts.model.llm.merge_and_unload()  # type: ignore[operator]
    connector = parts.model.projector
    config = PALLaVAConfig(llm.config, parts.model.visual_encoder.config, asdict(connector.config))
    whole = PALLaVAForConditionalGeneration(config)
    whole.llm.load_state_dict(llm.state_dict())
    whole.projector.load_state_dict(connector.state_dict())
    whole.visual_encoder.load_state_dict(parts.model.visual_encoder.state_dict())
    whole.save_pretrained(tmp_path)
    PALLaVAProcessor(goldens.tokenizer(), tile_px=32).save_pretrained(tmp_path)
    exported = load_model(tmp_path, device="cpu")
    assert exported.prompt_template == "llama3_chat"
    for name, text in zip(IMAGES, QUESTIONS, strict=True):
        expected = load(crossing).answer(picture(name), text, max_new_tokens=8)
        assert exported.answer(picture(name), text, max_new_tokens=8) == expected
    with pytest.raises(ValueError, match="contains all parts"):
        load_model(tmp_path, crossing / "llava", device="cpu")
    with pytest.raises(ValueError, match=r"layer of its encoder in config\.json, .* leave it out"):
        load_model(tmp_path, device="cpu", visual_select_layer=-2)
    PALLaVAProcessor(goldens.tokenizer(), tile_px=32, pad_to_square=True).save_pretrained(tmp_path)
    image = Image.open(picture("tall_3.png")).convert("RGB")
    padded = load_model(tmp_path, device="cpu").pixel_values(image)
    assert torch.equal(padded, AnyRes(32, pad_to_square=True)(image))
    processor = PALLaVAProcessor.from_pretrained(tmp_path)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert torch.equal(processor(image, "<image>\nWhat?")["pixel_values"], padded)


def test_importing_the_package_stays_cheap() -> None:
    code = "import sys, pallava; print('torch' in sys.modules, 'load_model' in pallava.__all__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True"]
