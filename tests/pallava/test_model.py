"""The model as XTuner builds it: parts from folders, stage after stage, what is saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from mmengine.config import Config
from transformers import AutoModelForCausalLM

from pallava.default_collate_fn import default_collate_fn
from pallava.model import LLaVAModel
from pallava.modeling.folders import load_connector, load_vision_encoder, save_vision_encoder
from pallava.registry import ENCODERS
from pathcore.weights import CheckpointError, read_state_dict
from tests.pallava import goldens


@pytest.fixture(scope="module")
def plip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "plip"
    save_vision_encoder(goldens.encoder(), folder)
    return folder


def build(plip: Path | str, **changes: Any) -> LLaVAModel:
    """The recorded model as a config would ask for it."""
    arguments: dict[str, Any] = {
        "llm": {
            "type": AutoModelForCausalLM.from_pretrained,
            "pretrained_model_name_or_path": str(goldens.TINY_LLAMA),
        },
        "visual_encoder": str(plip),
        "freeze_llm": True,
        "freeze_visual_encoder": True,
        "llm_lora": goldens.lora_config(target_modules=None),
        "num_hidden_layers": 2,
        "projector_type": "qformer_mlp",
        "use_activation_checkpointing": False,
    }
    return LLaVAModel(**(arguments | changes))


def recorded_batch(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    io_ = goldens.read_tensors(f"model/{kind}/ref_io.safetensors")
    data = {name: io_[name] for name in ("input_ids", "attention_mask", "labels", "position_ids")}
    data["pixel_values"] = [io_["pixel_values.0"], io_["pixel_values.1"]]
    return data, io_


@pytest.mark.parametrize(
    ("kind", "checkpoint", "mask"),
    [
        ("released", goldens.RELEASED_PTH, "exact"),
        ("released", goldens.RELEASED_PTH, "published"),
        ("crossattn", goldens.CROSSATTN_STATE, "published"),
    ],
)
def test_a_published_checkpoint_gives_the_published_loss(
    plip: Path, kind: str, checkpoint: Path, mask: str
) -> None:
    model = build(plip, pretrained_pth=str(checkpoint), sub_image_mask=mask).eval()
    assert model.projector.uses_sub_images == (kind == "crossattn")
    data, recorded = recorded_batch(kind)
    with torch.no_grad():
        loss = model(data, mode="loss")["loss"]
        logits = model(data, mode="tensor").logits
        predicted = model(data, mode="predict")
    torch.testing.assert_close(loss, recorded["loss"][0], atol=goldens.LOSS_ATOL, rtol=0)
    torch.testing.assert_close(logits, recorded["logits"], atol=goldens.LOSS_ATOL, rtol=0)
    assert torch.equal(torch.stack([one["logits"] for one in predicted]), logits)


def test_gradients_with_everything_switched_on_are_the_published_ones(plip: Path) -> None:
    model = build(
        plip,
        pretrained_pth=goldens.CROSSATTN_STATE,
        sub_image_mask="published",
        use_activation_checkpointing=True,
    )
    goldens.without_dropout(model)
    data, _ = recorded_batch("crossattn")
    model(data)["loss"].backward()
    expected = goldens.read_json("model/crossattn/ref_grads.json")["param_norms"]
    found = goldens.gradient_norms(model)
    assert found == pytest.approx(expected, rel=goldens.NORM_RTOL, abs=1e-6)


def test_only_what_is_trained_is_saved(plip: Path) -> None:
    released = read_state_dict(goldens.RELEASED_PTH)
    model = build(plip, pretrained_pth=goldens.RELEASED_PTH)
    assert model.state_dict().keys() == released.keys()
    assert all(torch.equal(tensor, released[name]) for name, tensor in model.state_dict().items())
    with_encoder = build(plip, freeze_visual_encoder=False).state_dict()
    encoder = {name for name in with_encoder if name.startswith("visual_encoder.")}
    assert len(encoder) == len(goldens.encoder().state_dict())
    whole = build(plip, llm_lora=None, freeze_llm=False).state_dict()
    assert "llm.lm_head.weight" in whole
    frozen = build(plip, llm_lora=None).state_dict()
    assert all(name.startswith("projector.") for name in frozen)


def test_the_second_stage_begins_where_the_first_ended(plip: Path, tmp_path: Path) -> None:
    first = build(plip)
    assert first.projector.uses_sub_images  # a new model is of the paper's kind
    torch.save({"state_dict": first.state_dict(), "meta": {}}, tmp_path / "iter_2.pth")
    second = build(plip, pretrained_pth=tmp_path / "iter_2.pth")
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert trained == set(second.state_dict()) - {"projector.model.bert.embeddings.position_ids"}


@pytest.mark.parametrize(("asked", "has"), [(True, "without"), (False, "with")])
def test_a_mode_that_the_checkpoint_has_not_is_an_error(plip: Path, asked: bool, has: str) -> None:
    checkpoint = goldens.RELEASED_PTH if asked else goldens.CROSSATTN_STATE
    with pytest.raises(CheckpointError, match=rf"{has} cross-attention, .*={asked}; leave"):
        build(plip, pretrained_pth=checkpoint, cross_attention=asked)


def test_the_mode_asked_for_is_built(plip: Path) -> None:
    assert not build(plip, cross_attention=False).projector.uses_sub_images
    assert build(plip, cross_attention=True).projector.uses_sub_images


def test_a_partial_checkpoint_is_an_error_that_lists_names(plip: Path, tmp_path: Path) -> None:
    partial = read_state_dict(goldens.RELEASED_PTH)
    gone = "llm.base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    del partial[gone], partial["projector.model.norm.bias"]
    torch.save(partial | {"llm.extra": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        build(plip, pretrained_pth=tmp_path / "a.pth")
    message = str(caught.value)
    assert "2 missing, 1 unexpected" in message
    assert gone in message
    assert "projector.model.norm.bias" in message
    assert "unexpected: llm.extra" in message


def test_a_checkpoint_of_another_model_is_an_error(plip: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"head.weight": torch.zeros(2, 2)}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"(?s)a\.pth does not fit the trained part.*head\."):
        build(plip, pretrained_pth=tmp_path / "a.pth")


def test_another_lora_size_is_an_error(plip: Path) -> None:
    lora = goldens.lora_config(r=8, target_modules=None)
    with pytest.raises(CheckpointError, match=r"(?s)28 of another.*\(4, 64\) found, \(8, 64\)"):
        build(plip, pretrained_pth=goldens.RELEASED_PTH, llm_lora=lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"visual_encoder": "checkpoints/absent"},
            "visual encoder checkpoints/absent: expected a folder",
        ),
        ({"pretrained_pth": "work_dirs/iter_9.pth"}, r"checkpoint work_dirs/iter_9\.pth: no such"),
        ({"llm": "models/absent"}, r"language model 'models/absent' cannot be loaded"),
        ({"llm": "/models/absent"}, r"language model '/models/absent' cannot be loaded"),
    ],
)
def test_a_config_that_names_what_is_absent(
    plip: Path, changes: dict[str, Any], message: str
) -> None:
    if "llm" in changes:
        changes = {
            "llm": {
                "type": AutoModelForCausalLM.from_pretrained,
                "pretrained_model_name_or_path": changes["llm"],
            }
        }
    with pytest.raises(FileNotFoundError, match=message):
        build(plip, **changes)


def test_a_connector_nobody_registered_is_named(plip: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown connector 'qformer_mpl'; did you mean qformer_mlp\? Reg"
    ):
        build(plip, projector_type="qformer_mpl")


def test_an_encoder_by_its_registered_name(plip: Path) -> None:
    model = build(f"plip:{plip}")
    expected = goldens.encoder().state_dict()
    found = model.visual_encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="unknown encoder 'pilp'"):
        build(f"pilp:{plip}")
    assert "plip" in ENCODERS


def test_fields_of_the_connector_can_be_set(plip: Path) -> None:
    connector = {"attention_probs_dropout_prob": 0.1, "intermediate_size": 32}
    model = build(plip, connector=connector, projector_depth=2, cross_attention_freq=2)
    config = model.projector.config
    assert (config.attention_probs_dropout_prob, config.intermediate_size) == (0.1, 32)
    assert (config.depth, config.cross_attention_freq) == (2, 2)
    assert (config.visual_hidden_size, config.llm_hidden_size) == (64, 64)


def test_configs_may_come_from_mmengine(plip: Path) -> None:
    from peft import LoraConfig

    config = Config({"llm_lora": {"type": LoraConfig, "r": 2, "task_type": "CAUSAL_LM"}})
    model = build(plip, llm_lora=config.llm_lora)
    trained = [name for name in model.state_dict() if "lora_A" in name]
    assert len(trained) == 2 * 7  # every linear layer of both blocks, the output not


def test_longer_texts_stretch_the_positions(plip: Path) -> None:
    assert getattr(build(plip).llm.config, "rope_scaling", None) is None
    longer = build(plip, max_position_embeddings=1500).llm.config
    assert longer.rope_scaling["factor"] == 3.0  # 512 were trained
    assert longer.rope_scaling["rope_type"] == "linear"
    assert build(plip, max_position_embeddings=512).llm.config.rope_scaling is None


def test_modes_of_mmengine(plip: Path) -> None:
    model = build(plip)
    data, _ = recorded_batch("released")
    with pytest.raises(ValueError, match="expected 'loss', 'tensor' or 'predict', found 'train'"):
        model(data, mode="train")
    model.init_weights()  # MMEngine calls it; the weights stay
    assert set(model(data)) == {"loss"}


def test_a_mixed_batch_of_the_collate_function_trains(plip: Path) -> None:
    model = build(plip, use_activation_checkpointing=True).train()
    image = {"input_ids": [0, -200, 9], "labels": [-100, -100, 9]}
    image["pixel_values"] = [goldens.noise(6, 3, 32, 32)]
    text = {"input_ids": [0, 7, 8], "labels": [-100, 7, 8]}
    for samples in ([image, text], [text, text]):
        model.zero_grad()
        loss = model(default_collate_fn(samples)["data"])["loss"]
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert loss.item() > 0
        assert not any(gradient is None for gradient in gradients)


def test_checkpointing_is_switched_in_every_part(plip: Path) -> None:
    model = build(plip, use_activation_checkpointing=True, freeze_visual_encoder=False)
    parts = model.llm, model.visual_encoder, model.projector
    assert model.llm.is_gradient_checkpointing
    assert model.visual_encoder.gradient_checkpointing and model.projector.gradient_checkpointing
    model.activation_checkpointing_disable()
    assert not model.llm.is_gradient_checkpointing
    assert not any(getattr(part, "gradient_checkpointing", False) for part in parts[1:])


def test_it_answers_and_keeps_its_weights_when_copied(plip: Path) -> None:
    model = build(plip, pretrained_pth=goldens.RELEASED_PTH).eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    sizes = {"intermediate_size": model.projector.config.intermediate_size}
    again = build(plip, cross_attention=False, connector=sizes).eval()
    again.load_state_dict(torch.load(buffer, weights_only=True), strict=False)
    ids = torch.tensor([[0, -200, 9, 12]])
    images = [goldens.noise(5, 3, 32, 32)]
    answers = [
        one.generate_answer(ids, images, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for one in (model, again)
    ]
    assert torch.equal(*answers)


def test_a_checkpoint_of_another_model_is_not_loaded_in_part(plip: Path) -> None:
    from mmengine.runner.checkpoint import load_state_dict

    deeper, other_rank = build(plip, num_hidden_layers=3), goldens.lora_config(r=2)
    trained = build(plip).state_dict()
    # MMEngine's function is that of --resume and load_from, torch's that of DeepSpeed and XTuner.
    for load in (load_state_dict, lambda model, state: model.load_state_dict(state, strict=False)):
        with pytest.raises(CheckpointError, match="26 missing, 0 unexpected"):
            load(deeper, trained)
        with pytest.raises(CheckpointError, match="0 unexpected, 28 of another shape"):
            load(build(plip, llm_lora=other_rank), trained)
        load(build(plip), trained)


@pytest.mark.parametrize("save_format", ["official", "huggingface"])
def test_stock_formats_have_no_place_for_the_connector(plip: Path, save_format: str) -> None:
    with pytest.raises(ValueError, match=f"--save-format {save_format}.*use --save-format xtuner"):
        build(plip).to_hf(None, "out", save_format=save_format)


@pytest.mark.parametrize("kind", ["released", "crossattn"])
def test_what_is_exported_loads_again(plip: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    from pallava.modeling.llava import PALLaVA

    checkpoint = goldens.RELEASED_PTH if kind == "released" else goldens.CROSSATTN_STATE
    trained = build(plip, pretrained_pth=checkpoint, freeze_visual_encoder=True)
    trained.to_hf(None, str(tmp_path), fp32=True)
    assert {path.name for path in tmp_path.iterdir()} == {"llm_adapter", "projector"}
    connector = load_connector(tmp_path / "projector")
    assert connector.config.num_attention_heads == 4
    llm = PeftModel.from_pretrained(goldens.llm(r=0), tmp_path / "llm_adapter")
    model = PALLaVA(llm, load_vision_encoder(plip), connector, sub_image_mask="published")
    data, recorded = recorded_batch(kind)
    data.pop("position_ids")
    with torch.no_grad():
        loss = model.eval()(**data)["loss"]
    torch.testing.assert_close(loss, recorded["loss"][0], atol=goldens.LOSS_ATOL, rtol=0)


def test_what_inference_needs_of_the_config_is_recorded(plip: Path, tmp_path: Path) -> None:
    dataset = {"pad_image_to_square": True, "anyres_image": False}
    cfg = Config({"train_dataloader": {"dataset": dataset}})
    build(plip, visual_select_layer=-1).to_hf(cfg, str(tmp_path), fp32=True)
    record = json.loads((tmp_path / "conversion.json").read_bytes())
    assert record["visual_select_layer"] == -1 and record["pad_to_square"] is True
    assert record["sub_images"] is False


@pytest.mark.parametrize("kind", ["released", "crossattn"])
def test_a_model_without_memory_is_exported_in_the_mode_of_its_checkpoint(
    plip: Path, tmp_path: Path, kind: str
) -> None:
    from pallava.modeling.qformer import connector_state_dict

    checkpoint = goldens.RELEASED_PTH if kind == "released" else goldens.CROSSATTN_STATE
    state_dict = read_state_dict(checkpoint)
    with init_empty_weights():  # as `xtuner convert pth_to_hf` does it
        empty = build(plip, cross_attention=True, connector={"intermediate_size": 128})
    for name, tensor in state_dict.items():
        set_module_tensor_to_device(empty, name, "cpu", tensor)
    empty.to_hf(None, str(tmp_path), fp32=True)
    connector = load_connector(tmp_path / "projector")
    assert connector.uses_sub_images == (kind == "crossattn")
    expected = connector_state_dict(state_dict)
    assert connector.state_dict().keys() == expected.keys()
    assert all(torch.equal(connector.state_dict()[name], expected[name]) for name in expected)
