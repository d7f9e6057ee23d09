from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gigapath.slide_encoder import (
    ARCHITECTURES,
    LongNetViT,
    create_model,
    register_architecture,
)
from tests.gigapath.slide_goldens import (
    golden,
    golden_json,
    recipe_inputs,
    recipe_state,
    tiny_encoder,
)

CASES = [
    (name, case) for name, spec in golden_json("slide/index").items() for case in spec["cases"]
]
ATOL = 5e-5


def inputs_of(name: str, case: str, recorded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if f"{case}.x" in recorded:
        return recorded[f"{case}.x"], recorded[f"{case}.coords"]
    batch, length = (int(part[1:]) for part in case.split("_"))
    x, coords = recipe_inputs(f"{name}_{case}", batch, length, 32, 64 if name == "tinyA" else 1000)
    assert torch.equal(x[:, :4], recorded[f"{case}.x_head"])
    assert torch.equal(coords[:, :4], recorded[f"{case}.coords_head"])
    return x, coords


def assert_near(found: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda part: part)
@torch.no_grad()
def test_small_encoders_are_the_original(name: str, case: str) -> None:
    recorded = golden(f"slide/{name}_io")
    x, coords = inputs_of(name, case, recorded)
    for pooling in ("cls", "gap"):
        model = tiny_encoder(name, global_pool=pooling == "gap")
        assert_near(model(x, coords)[0], recorded[f"{case}.{pooling}"])
        layers = model(x, coords, all_layer_embed=True)
        assert isinstance(layers, list)
        assert_near(torch.stack(layers), recorded[f"{case}.{pooling}_all"])
        chosen: Any = {"cls": "cls", "gap": "mean"}[pooling]
        assert_near(model.embed(x, coords, pooling=chosen), recorded[f"{case}.{pooling}"])
        for index, vector in enumerate(recorded[f"{case}.{pooling}_all"]):
            assert_near(model.embed(x, coords, index, chosen), vector)
    if f"{case}.hidden_states" in recorded:
        for index, state in enumerate(recorded[f"{case}.hidden_states"]):
            assert_near(model.tokens(x, coords, index, with_cls=True), state)
            assert_near(model.tokens(x, coords, index), state[:, 1:])
        assert_near(model.tokens(x, coords, with_cls=True), recorded[f"{case}.encoder_out"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_original(checkpointing: bool) -> None:
    recorded = golden("slide/tinyA_grad_b2_L100")
    inputs = golden("slide/tinyA_io")
    model = tiny_encoder("tinyA", dropout=0.0, drop_path_rate=0.0).train()
    model.set_grad_checkpointing(checkpointing)
    x = inputs["b2_L100.x"].clone().requires_grad_()
    layers = model(x, inputs["b2_L100.coords"], all_layer_embed=True)
    loss = sum((a * b).sum() for a, b in zip(layers, recorded["w"], strict=True)) / 100
    assert isinstance(loss, Tensor)
    loss.backward()
    assert_near(loss.detach(), recorded["loss"].reshape(()))
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    gradients["x.grad"] = x.grad
    assert set(gradients) == set(recorded) - {"w", "loss"}
    for name, gradient in gradients.items():
        if not recorded[name].numel():
            assert gradient is None, name
            continue
        assert gradient is not None, name
        if name.endswith("k_proj.bias"):  # next to 0, as it shifts all scores but the zeros'
            assert_near(gradient, recorded[name], 1e-5)
            continue
        difference = (gradient - recorded[name]).norm() / recorded[name].norm()
        assert difference < 1e-4, name


def assert_full_size(arch: str, tag: str, in_chans: int, lengths: tuple[int, ...]) -> None:
    recorded = golden(f"slide/{tag}_{arch.removeprefix('gigapath_slide_')}_io")
    model = create_model("", arch, in_chans)
    model.load_state_dict(recipe_state(model.state_dict()))
    with torch.no_grad():
        for length in lengths:
            x, coords = recipe_inputs(f"{tag}_b1_L{length}", 1, length, in_chans)
            layers = model(x, coords, all_layer_embed=True)
            assert_near(torch.stack(layers), recorded[f"L{length}.cls_all"])
            assert_near(model(x, coords)[0], recorded[f"L{length}.cls"])
            assert_near(model.embed(x, coords, pooling="mean"), recorded[f"L{length}.gap"])
            if length < 1000:
                assert_near(model.embed(x, coords, 11, "mean"), recorded[f"L{length}.gap_all"][11])


def test_flash_size_is_the_original() -> None:
    assert_full_size("gigapath_slide_enc12l384d", "flash", 384, (1, 200))


@pytest.mark.slow
def test_flash_size_over_two_segments_is_the_original() -> None:
    assert_full_size("gigapath_slide_enc12l384d", "flash", 384, (1300,))


@pytest.mark.slow
def test_released_size_is_the_original() -> None:
    assert_full_size("gigapath_slide_enc12l768d", "full", 1536, (1, 300, 1500))


@pytest.mark.parametrize("arch", golden_json("slide/state_dict_names"))
def test_names_and_shapes_of_every_published_size(arch: str) -> None:
    recorded = golden_json("slide/state_dict_names")[arch]
    in_chans = recorded["state_dict_with_layer_0_only"]["patch_embed.proj.weight"][1]
    with torch.device("meta"):
        model = LongNetViT(in_chans=in_chans, **ARCHITECTURES[arch])
    expected = {}
    for name, shape in recorded["state_dict_with_layer_0_only"].items():
        layers = range(recorded["depth"] if name.startswith("encoder.layers.0.") else 1)
        for layer in layers:
            expected[name.replace("layers.0.", f"layers.{layer}.")] = shape
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["params"]
    assert model.encoder.config.segment_lengths == (1024, 5792, 32768, 185363, 1048576)


@torch.no_grad()
def test_padding_is_masked_unless_the_original_is_asked_for() -> None:
    recorded = golden("slide/padding_ignored_tinyB_L60_L100")
    slides = [
        recipe_inputs(f"pad{number}", 1, length, 32) for number, length in ((0, 60), (1, 100))
    ]
    x = torch.nn.utils.rnn.pad_sequence([slide[0][0] for slide in slides], batch_first=True)
    coords = torch.nn.utils.rnn.pad_sequence([slide[1][0] for slide in slides], batch_first=True)
    padding_mask = recorded["pad_mask"] == 0
    model = tiny_encoder("tinyB")
    for given_as in ({"lengths": [60, 100]}, {"padding_mask": padding_mask}):
        together = torch.stack(model(x, coords, all_layer_embed=True, **given_as))
        for number in range(2):
            assert_near(together[:, number], recorded[f"cls_alone{number}"][:, 0])
    model.padding = "ignored"
    ignored = torch.stack(model(x, coords, all_layer_embed=True, padding_mask=padding_mask))
    assert_near(ignored, recorded["cls_batched_padded"])
    assert (ignored - together).abs().max() > 1


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), layer=st.integers(0, 3))
@torch.no_grad()
def test_what_lies_in_the_padding_never_matters(lengths: list[int], layer: int) -> None:
    model = tiny_encoder("tinyA")
    longest = max(lengths) + 3
    x, coords = recipe_inputs("any", len(lengths), longest, 32, 64)
    other_x, other_coords = x.clone(), coords.clone()
    for number, length in enumerate(lengths):
        other_x[number, length:] = float("nan")
        other_coords[number, length:] = -1e9
    for pooling in ("cls", "mean"):
        chosen: Any = pooling
        batch = model.embed(x, coords, layer, chosen, lengths=lengths)
        assert torch.equal(
            batch, model.embed(other_x, other_coords, layer, chosen, lengths=lengths)
        )
        for number, length in enumerate(lengths):
            alone = model.embed(x[number, :length], coords[number, :length], layer, chosen)
            assert_near(batch[number : number + 1], alone, 1e-5)
    tokens = model.tokens(x, coords, layer, lengths=lengths)
    assert tokens.shape == (len(lengths), longest, 64)
    for number, length in enumerate(lengths):
        assert not tokens[number, length:].any()
        assert tokens[number, :length].any(-1).all()


@torch.no_grad()
def test_order_of_tiles_matters_only_through_dilation() -> None:
    # In one segment without dilation, attention knows no order but the positions'.
    model = tiny_encoder("tinyA", segment_lengths=(1000,), dilated_ratios=(1,))
    x, coords = recipe_inputs("order", 1, 80, 32, 64)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert_near(model(x[:, order], coords[:, order])[0], model(x, coords)[0], 1e-5)
    dilated = tiny_encoder("tinyA")
    shuffled = dilated(x[:, order], coords[:, order])[0]
    assert (shuffled - dilated(x, coords)[0]).abs().max() > 0.01


@torch.no_grad()
def test_one_slide_without_a_batch_axis() -> None:
    model = tiny_encoder("tinyA")
    x, coords = recipe_inputs("single", 1, 20, 32, 64)
    assert torch.equal(model(x[0], coords[0]), model(x, coords))
    assert model(x, coords).shape == (1, 1, 64)
    assert model(x, coords).squeeze().shape == (64,)
    assert model.tokens(x[0], coords[0]).shape == (1, 20, 64)
    assert len(model(x[0], coords[0], all_layer_embed=True)) == 4


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_other_precisions(dtype: torch.dtype, tolerance: float, autocast: bool) -> None:
    x, coords = recipe_inputs("dtype", 2, 100, 32, 64)
    with torch.no_grad():
        expected = tiny_encoder("tinyA")(x, coords)[0]
    model = tiny_encoder("tinyA")
    if not autocast:
        model = model.to(dtype)
    elif dtype is torch.float64:
        pytest.skip("no autocast to float64")
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = model(x, coords)[0]
    assert (found.double() - expected).norm() / expected.norm() < tolerance
    found.double().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def nan_tile(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 3, 5] = float("nan")
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=nan_tile), r"x of slide 1: the embedding of tile 3 .* \(1 of 20 tiles\)"),
        (dict(x=lambda x: x[..., :16]), r"x \(2, 20, 16\): expected \(B, L, 32\) or \(L, 32\)"),
        (dict(x=lambda x: x[:, :0], coords=lambda c: c[:, :0]), "no tiles"),
        (dict(x=lambda x: x[:0], coords=lambda c: c[:0]), "no tiles"),
        (dict(coords=lambda c: c[:, :19]), r"coords \(2, 19, 2\): expected \(2, 20, 2\)"),
        (dict(coords=lambda c: c[..., :1]), r"coords \(2, 20, 1\)"),
        (dict(coords=lambda c: c[0]), r"coords \(20, 2\)"),
        (dict(coords=lambda c: c - 1e5), "coords of slide 0: tile .* expected pixels at level 0"),
        (dict(coords=lambda c: c * 100), r"from 0 to 16383 \(tile_size 256 times 64 cells\)"),
        (dict(coords=lambda c: c.half()), "float16 cannot hold"),
        (dict(coords=lambda c: torch.floor(c / 256)), "expected pixels at level 0. Multiply"),
        (dict(lengths=[20]), "lengths: 1 numbers for 2 slides"),
        (dict(lengths=[0, 20]), "slide 0 has 0 tiles: expected 1 to 20"),
        (dict(lengths=[20, 21]), "slide 1 has 21 tiles"),
        (dict(padding_mask=torch.ones(2, 20)), "slide 0 has 0 tiles"),
        (dict(padding_mask=torch.zeros(2, 19)), r"padding_mask \(2, 19\): expected \(2, 20\)"),
        (dict(padding_mask=torch.eye(2, 20)), "tiles follow padding"),
        (dict(padding_mask=torch.zeros(2, 20), lengths=[20, 20]), "give one of them"),
    ],
)
def test_inputs_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    x, coords = recipe_inputs("bad", 2, 20, 32, 64)
    arguments = dict(x=x, coords=coords)
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        tiny_encoder("tinyA")(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(layer=4), "layer 4: expected 0 to 3 or 'final'"),
        (dict(layer=-1), "layer -1"),
        (dict(layer="last"), "layer 'last'"),
        (dict(pooling="max"), "pooling 'max': expected 'cls' or 'mean'"),
    ],
)
def test_unknown_layers_and_poolings_are_refused(call: dict[str, Any], message: str) -> None:
    x, coords = recipe_inputs("bad", 1, 5, 32, 64)
    with pytest.raises(ValueError, match=message):
        tiny_encoder("tinyA").embed(x, coords, **call)


@torch.no_grad()
def test_the_originals_positions_beyond_the_grid_by_name() -> None:
    x, coords = recipe_inputs("beyond", 1, 30, 32, 64)
    coords[0, 0] = torch.tensor([0.0, 64 * 256.0])
    aliased = coords.clone()
    aliased[0, 0] = torch.tensor([256.0, 0.0])
    model = tiny_encoder("tinyA", out_of_grid="original")
    assert torch.equal(model(x, coords), model(x, aliased))
    with pytest.raises(ValueError, match="expected pixels"):
        tiny_encoder("tinyA")(x, coords)


@torch.no_grad()
def test_checks_can_be_left_out() -> None:
    x, coords = recipe_inputs("unchecked", 1, 30, 32, 64)
    x[0, 3] = float("nan")
    assert tiny_encoder("tinyA", check_inputs=False)(x, coords).isnan().all()


def test_sums_that_overflow_are_no_bad_tiles() -> None:
    x, coords = recipe_inputs("large", 1, 30, 32, 64)
    x[0, 3] = 3e38
    model = tiny_encoder("tinyA")
    model._check(x, coords, [30], 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(embed_dim=30), "embed_dim 30: expected a multiple of 4"),
        (dict(padding="mask"), "padding 'mask': expected one of masked, ignored"),
        (dict(out_of_grid="wrap"), "out_of_grid 'wrap'"),
        (dict(embed_dim=36), "embed_dim 36: expected a multiple of num_heads 16"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongNetViT(in_chans=8, depth=1, **{"embed_dim": 64, **settings})


def test_a_size_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ARCHITECTURES, "small", raising=False)
    with pytest.raises(
        ValueError, match="model_arch 'small': no such slide encoder; known: gigapath_slide_enc12"
    ):
        create_model("", "small", 8)
    try:
        register_architecture("small", embed_dim=64, depth=2, num_heads=4)
        register_architecture("small", embed_dim=64, depth=2, num_heads=4)
        with pytest.raises(ValueError, match="'small' is registered with"):
            register_architecture("small", embed_dim=32, depth=2)
        model = create_model("", "small", 8, global_pool=True, dropout=0.1)
        assert (model.depth, model.global_pool, model.training) == (2, True, False)
        x, coords = recipe_inputs("own", 1, 9, 8)
        assert bool(torch.isfinite(model(x, coords)).all())
    finally:
        ARCHITECTURES.pop("small", None)


def test_random_weights_follow_the_seed_and_are_xaviers() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create_model("", "gigapath_slide_enc12l384d", 384))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    bound = (6 / (384 + 1536)) ** 0.5
    for name, tensor in states[0].items():
        if name.endswith(".bias"):
            assert not tensor.any(), name
        elif name.endswith("fc1.weight"):
            assert 0.99 * bound < float(tensor.abs().max()) <= bound
        elif tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
    assert all(p.device.type == "cpu" and p.requires_grad for p in models[0].parameters())
    assert models[0].pos_axis.device.type == "cpu"


def test_dropout_acts_in_training_only() -> None:
    x, coords = recipe_inputs("dropout", 1, 30, 32, 64)
    model = tiny_encoder("tinyA")
    with torch.no_grad():
        assert torch.equal(model(x, coords), model(x, coords))
        model.train()
        outputs = [model(x, coords) for _ in range(3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_residual_stream_stays_wide_under_autocast(dtype: torch.dtype) -> None:
    x, coords = recipe_inputs("residual", 1, 30, 32, 64)
    model = tiny_encoder("tinyA")
    with torch.autocast("cpu", dtype):
        assert model.tokens(x, coords, 3).dtype is torch.float32
    assert model.to(dtype).tokens(x, coords, 3).dtype is dtype


@torch.no_grad()
def test_features_stored_in_half_precision() -> None:
    x, coords = recipe_inputs("half", 1, 30, 32, 64)
    model = tiny_encoder("tinyA")
    assert torch.equal(model(x.half(), coords), model(x.half().float(), coords))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    recorded = golden("slide/flash_enc12l384d_io")
    model = create_model("", "gigapath_slide_enc12l384d", 384)
    model.load_state_dict(recipe_state(model.state_dict()))
    model.cuda()
    x, coords = recipe_inputs("flash_b1_L1300", 1, 1300, 384)
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        vector = model(x.cuda(), coords.cuda())[0]
    tolerance = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    expected = recorded["L1300.cls"]
    difference = vector.detach().cpu().float() - expected
    assert difference.norm() / expected.norm() < tolerance
    vector.float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
