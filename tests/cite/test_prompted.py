"""Prompted encoders equal the published code where it works, and fix its bugs."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cite.encoders import build_encoder
from cite.prompted import PromptedEncoder, merge_lora
from pathcore.weights import CheckpointError
from tests.cite.goldens import (
    CLIP,
    CLIP_ARCH,
    CLIP_WEIGHTS,
    FP16,
    FP32,
    VIT,
    clip_encoder,
    read_arrays,
    vit_encoder,
)

CASE = re.compile(r"(?P<init>[a-z]+)_len(?P<length>\d)_layers(?P<layers>[\d-]+)(?:_(?P<pos>\w+))?")
ENTRIES_THAT_WORK = {(1, 1): (0, 1), (0, 1, 5): (0, 1)}
"""The published code indexed prompts by block: row 0 always entered at the input, row i at block i,
further rows never. The layers on the right say that in our terms."""


def cases(file: str) -> list[str]:
    return sorted(
        {key.rsplit("/", 1)[0] for key in read_arrays(file) if re.search(r"_len\d_.*/y1", key)}
    )


def arguments_of(case: str) -> tuple[dict[str, Any], int]:
    found = CASE.search(case)
    assert found is not None
    layers = tuple(map(int, found["layers"].split("-")))
    layers = ENTRIES_THAT_WORK.get(layers, layers)
    position = "add" if "_add" in case else "prepend"
    arguments = dict(
        prompt_length=int(found["length"]),
        prompt_layers=layers,
        prompt_pos=position,
        prompt_init=found["init"],
    )
    return arguments, len(layers)


def check_case(
    model: PromptedEncoder, golden: dict[str, Tensor], images: dict[str, Tensor], case: str,
    tolerance: dict[str, float],
) -> None:  # fmt: skip
    assert model.prompts is not None
    num_layers = len(model.prompts.prompt)
    initial = golden[f"{case}/prompt_init"][:num_layers].float()
    if "token" in case:
        assert not initial.any()
    else:
        model.prompts.prompt.data.copy_(initial)
    features = model(images["x1"])
    torch.testing.assert_close(features, golden[f"{case}/y1"].float(), **tolerance)
    if "token" in case:
        expected = golden[f"{case}/prompt_after_first_forward"].float()
        torch.testing.assert_close(model.prompts.prompt.detach(), expected, **tolerance)
    (features * images["gout"]).sum().backward()
    gradient = golden[f"{case}/prompt_grad1"].float()
    assert not gradient[num_layers:].any()
    assert model.prompts.prompt.grad is not None
    scale = gradient.abs().max()
    torch.testing.assert_close(
        model.prompts.prompt.grad / scale, gradient[:num_layers] / scale, **tolerance
    )
    if f"{case}/y2" in golden:
        torch.testing.assert_close(
            model(images["x2"]).detach(), golden[f"{case}/y2"].float(), **tolerance
        )


@pytest.mark.parametrize("case", cases("backbone.npz"))
def test_prompted_clip(case: str) -> None:
    golden = read_arrays("backbone.npz")
    arguments, _ = arguments_of(case)
    model = clip_encoder(project="projFalse" not in case, **arguments)
    if "projFalse" in case:
        model.prompts.prompt.data.copy_(golden[f"{case}/prompt_init"])
        torch.testing.assert_close(model(golden["x1"]).detach(), golden[f"{case}/y1"], **FP32)
    else:
        check_case(model, golden, golden, case, FP32)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["prompts.prompt"]


@pytest.mark.parametrize("project", [True, False])
def test_plain_clip(project: bool) -> None:
    golden = read_arrays("backbone.npz")
    features = clip_encoder(project)(golden["x1"])
    torch.testing.assert_close(features, golden[f"plain_proj{project}/y1"], **FP32)
    assert not features.requires_grad


@pytest.mark.parametrize("case", cases("backbone_fp16.npz"))
def test_prompted_clip_in_half_precision(case: str) -> None:
    arguments, _ = arguments_of(case)
    model = clip_encoder(precision="fp16", **arguments)
    check_case(model, read_arrays("backbone_fp16.npz"), read_arrays("backbone.npz"), case, FP16)


def test_bf16_stays_near_fp32_and_keeps_norms_wide() -> None:
    images = read_arrays("backbone.npz")["x1"]
    narrow = clip_encoder(precision="bf16", prompt_length=2, prompt_init="zero")
    wide = clip_encoder(prompt_length=2, prompt_init="zero")
    difference = (narrow(images) - wide(images)).norm() / wide(images).norm()
    assert 0 < difference < 4e-2  # random weights; 2 significant digits
    names = {p.dtype: name for name, p in narrow.named_parameters()}
    assert set(names) == {torch.float32, torch.bfloat16}
    norm = narrow.get_parameter("encoder.model.ln_post.weight")
    assert narrow.prompts is not None
    assert norm.dtype == narrow.prompts.prompt.dtype == torch.float32


def test_autocast_of_the_host_reaches_the_blocks() -> None:
    golden = read_arrays("backbone.npz")
    model = clip_encoder(prompt_length=2, prompt_init="zero")
    expected = model(golden["x1"])
    kinds = set()
    linear = model.get_submodule("encoder.model.transformer.resblocks.0.mlp.c_fc")
    linear.register_forward_hook(lambda _m, _i, output: kinds.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model(golden["x1"])
    assert kinds == {torch.bfloat16}
    assert features.dtype == torch.float32
    assert (features - expected).norm() / expected.norm() < 4e-2
    (features * golden["gout"]).sum().backward()
    assert model.prompts.prompt.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_on_a_gpu(precision: str) -> None:
    golden = read_arrays("backbone.npz")
    model = clip_encoder(prompt_length=2, prompt_layers=[0, 2], precision=precision).cuda()
    features = model(golden["x1"].cuda())
    (features * golden["gout"].cuda()).sum().backward()
    reference = clip_encoder(prompt_length=2, prompt_layers=[0, 2])
    expected = reference(golden["x1"])
    (expected * golden["gout"]).sum().backward()
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    pairs = [(features, expected), (model.prompts.prompt.grad, reference.prompts.prompt.grad)]
    for found, wanted in pairs:
        assert (found.cpu() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("case", cases("vit_backbone.npz"))
def test_prompted_vit(case: str) -> None:
    golden = read_arrays("vit_backbone.npz")
    arguments, _ = arguments_of(case)
    check_case(vit_encoder(**arguments), golden, golden, case, FP32)


def test_frozen_vit() -> None:
    golden = read_arrays("vit_backbone.npz")
    torch.testing.assert_close(vit_encoder()(golden["x1"]), golden["frozen/y1"], **FP32)


def test_names_are_those_of_the_published_checkpoints() -> None:
    model = clip_encoder(prompt_length=1)
    released = {name.removeprefix("visual."): t for name, t in load_file(CLIP_WEIGHTS).items()}
    state = model.state_dict()
    assert set(state) - set(released) == {"prompt", "prompt_initialised"}
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in released.items())
    # A published checkpoint has prompts that are initialised, and no flag.
    released = {name: tensor.float() for name, tensor in released.items()}
    released["prompt"] = torch.full((1, 1, 128), 0.5)
    model.load_state_dict(released)
    model(read_arrays("backbone.npz")["x1"])
    assert model.prompts is not None
    assert torch.equal(model.prompts.prompt.detach(), released["prompt"])


def test_token_initialisation_happens_once_in_a_life() -> None:
    images = read_arrays("backbone.npz")
    first = clip_encoder(prompt_length=2)
    first(images["x1"])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = clip_encoder(prompt_length=2)
    again.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(again(images["x2"]), first(images["x2"]), rtol=0, atol=0)
    assert again.prompts is not None
    assert first.prompts is not None
    assert torch.equal(again.prompts.prompt, first.prompts.prompt)


def test_equal_prompts_stay_equal_unless_noise_parts_them() -> None:
    images = read_arrays("backbone.npz")
    spread = {}
    for noise in (0.0, 0.02):
        torch.manual_seed(0)
        model = clip_encoder(prompt_length=3, prompt_noise_std=noise)
        optimizer = torch.optim.SGD([model.prompts.prompt], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (model(images["x1"]) * images["gout"]).sum().backward()
            optimizer.step()
        spread[noise] = float(model.prompts.prompt.detach().std(dim=1).max())
    assert spread[0.0] < 1e-5
    assert spread[0.02] > 1e-2


def saved_numel(model: PromptedEncoder, images: Tensor) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        is_weight = any(isinstance(t, torch.nn.Parameter) for t in (tensor, tensor._base))
        total += 0 if is_weight else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return total


def test_no_graph_below_the_first_prompted_block() -> None:
    images = read_arrays("backbone.npz")["x1"]
    models = [
        clip_encoder(prompt_length=1, prompt_layers=[layer], prompt_init="zero")
        for layer in range(3)
    ]
    kept = [saved_numel(model, images) for model in models]
    assert kept[0] > kept[1] > kept[2] > 0
    assert saved_numel(clip_encoder(), images) == 0
    # the last block keeps little: its MLP sees the class token alone
    assert kept[2] < (kept[0] - kept[1]) / 1.5


def test_late_prompts_change_later_blocks_only() -> None:
    golden = read_arrays("backbone.npz")
    shallow = clip_encoder(prompt_length=2, prompt_layers=[0, 1], prompt_init="normal")
    prompt = shallow.prompts.prompt.data
    late = clip_encoder(prompt_length=2, prompt_layers=[1], prompt_init="zero")
    late.prompts.prompt.data.copy_(prompt[1:])
    # By hand: block 0 without prompts, then the prompts enter.
    encoder = late.encoder
    hidden = encoder.blocks()[0](encoder.embed(golden["x1"]))
    prompts = prompt[1].expand(len(hidden), -1, -1)
    hidden = torch.cat([hidden[:, :1], prompts, hidden[:, 1:]], dim=1)
    for block in encoder.blocks()[1:]:
        hidden = block(hidden)
    torch.testing.assert_close(late(golden["x1"]), encoder.pool(hidden), **FP32)
    assert not torch.allclose(late(golden["x1"]), shallow(golden["x1"]))


def test_frozen_encoder_stays_in_evaluation_mode() -> None:
    model = clip_encoder(prompt_length=1).train()
    assert model.training
    assert not model.encoder.training
    assert clip_encoder(frozen=False).train().encoder.training


def test_full_fine_tuning_reaches_every_weight() -> None:
    golden = read_arrays("backbone.npz")
    model = clip_encoder(frozen=False)
    features = model(golden["x1"])
    torch.testing.assert_close(features, golden["plain_projTrue/y1"], **FP32)
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_lora_trains_little_and_merges_exactly() -> None:
    golden = read_arrays("backbone.npz")
    torch.manual_seed(0)
    model = clip_encoder(lora=dict(r=4, lora_alpha=8))
    torch.testing.assert_close(model(golden["x1"]), golden["plain_projTrue/y1"], **FP32)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 2 * 2
    assert all("lora_" in name for name in trained)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = model(golden["x1"])
    assert not torch.allclose(expected, golden["plain_projTrue/y1"], atol=1e-2)
    merge_lora(model.encoder)
    assert set(model.state_dict()) == set(clip_encoder().state_dict())
    torch.testing.assert_close(model(golden["x1"]), expected, **FP32)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    images = read_arrays("backbone.npz")
    gradients = []
    for recompute in (False, True):
        model = clip_encoder(
            prompt_length=1, prompt_init="zero", gradient_checkpointing=recompute
        ).train()
        (model(images["x1"]) * images["gout"]).sum().backward()
        gradients.append(model.prompts.prompt.grad)
    torch.testing.assert_close(gradients[0], gradients[1], **FP32)


def test_batches_larger_than_a_part_and_copies() -> None:
    images = torch.cat([read_arrays("backbone.npz")[k] for k in ("x1", "x2", "x1")])
    model = clip_encoder(prompt_length=2, prompt_layers=[0, 2])
    together = model(images)
    single = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, single, **FP32)
    twin = copy.deepcopy(model)
    model.prompts.prompt.data.zero_()
    torch.testing.assert_close(twin(images), together, rtol=0, atol=0)


def test_frozen_weights_can_stay_out_of_checkpoints() -> None:
    images = read_arrays("backbone.npz")["x1"]
    model = clip_encoder(prompt_length=1, save_frozen=False)
    expected = model(images)
    state = model.state_dict()
    assert set(state) == {"prompt", "prompt_initialised"}
    again = clip_encoder(prompt_length=1, save_frozen=False)
    again.load_state_dict(state)
    torch.testing.assert_close(again(images), expected, rtol=0, atol=0)
    whole = {*state, *model.frozen_weights()}
    assert whole == set(clip_encoder(prompt_length=1).state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt_length=-1), "prompt_length -1"),
        (dict(prompt_length=1, prompt_layers=[]), "prompt_layers"),
        (dict(prompt_length=1, prompt_layers=[0, 3]), "from 0 to 2"),
        (dict(prompt_length=1, prompt_layers=[1, 1]), "ascending"),
        (dict(prompt_length=1, prompt_pos="append"), "prompt_pos 'append'"),
        (dict(prompt_length=1, prompt_init="ones"), "prompt_init 'ones'"),
        (dict(precision="int8"), "precision 'int8'"),
        (dict(precision="bf16", frozen=False), "AmpOptimWrapper"),
        (dict(lora=dict(r=2), frozen=False), "LoRA is for a frozen encoder"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_encoder(**arguments)


def test_checkpoint_of_another_architecture(tmp_path: Any) -> None:
    arch = CLIP_ARCH | {"vision_cfg": CLIP_ARCH["vision_cfg"] | {"layers": 4, "width": 64}}
    with pytest.raises(CheckpointError, match=r"(?s)12 missing.*of another shape.*resblocks\.3"):
        build_encoder(dict(library="open_clip", config=arch), CLIP_WEIGHTS)
    state = {k: v for k, v in load_file(CLIP_WEIGHTS).items() if "ln_pre" not in k}
    save_file(state | {"visual.extra": torch.zeros(1)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)2 missing, 1 unex.*: ln_pre.*: extra"):
        build_encoder(CLIP, tmp_path / "f.safetensors")


def test_larger_images_resize_the_positions() -> None:
    encoder = build_encoder(CLIP | dict(image_size=48), CLIP_WEIGHTS)
    model = PromptedEncoder(encoder)
    assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 48)
    same = clip_encoder().encoder.model.positional_embedding
    assert torch.equal(encoder.model.positional_embedding[0], same[0])


def test_wrong_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected \(batch, 3, height, width\), found \(3, 32, 32\)"
    ):
        clip_encoder()(torch.zeros(3, 32, 32))


def test_more_added_prompts_than_patches_are_refused() -> None:
    model = PromptedEncoder(
        build_encoder(VIT),
        prompt_length=17,
        prompt_pos="add",
        prompt_init="normal",
    )
    with pytest.raises(ValueError, match=r"prompt_length 17 .*at most 16, one for each patch"):
        model(torch.zeros(1, 3, 32, 32))
