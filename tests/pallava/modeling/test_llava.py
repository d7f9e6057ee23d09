"""The whole model against the goldens, and batches that the published code does not support."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pallava.modeling.contrast import CONTRAST_WEIGHT, contrast_loss
from pallava.modeling.llava import PALLaVA, SubImageMask, splice
from pallava.text.contrasts import ANSWER_BITS
from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.pallava import goldens

# (checkpoint, which sub-images are visible, recorded tensors, recorded gradients)
CASES = {
    "released_published": (goldens.RELEASED_PTH, "published", "ref_io", "ref_grads"),
    "released_exact": (goldens.RELEASED_PTH, "exact", "ref_io", "submask_fixed_grads"),
    "crossattn_published": (goldens.CROSSATTN_STATE, "published", "ref_io", "ref_grads"),
    "crossattn_exact": (
        goldens.CROSSATTN_STATE,
        "exact",
        "submask_fixed_io",
        "submask_fixed_grads",
    ),
}
every_case = pytest.mark.parametrize("case", CASES)
TOKENS = 4


def recorded(case: str) -> tuple[PALLaVA, dict[str, Tensor], list[Tensor]]:
    checkpoint, mask, io, _ = CASES[case]
    tensors = goldens.read_tensors(f"model/{checkpoint.parent.name}/{io}.safetensors")
    images = [tensors["pixel_values.0"], tensors["pixel_values.1"]]
    return goldens.model(checkpoint, mask), tensors, images


@every_case
def test_inputs_of_the_language_model_are_the_published_ones(case: str) -> None:
    model, io, images = recorded(case)
    with torch.no_grad():
        tokens = model.encode_images(images)
        inputs = model.prepare_inputs(io["input_ids"], images, io["attention_mask"], io["labels"])
    torch.testing.assert_close(tokens, io["projector_out"], atol=goldens.ENCODER_ATOL, rtol=0)
    torch.testing.assert_close(
        inputs.inputs_embeds, io["inputs_embeds"], atol=goldens.ENCODER_ATOL, rtol=0
    )
    assert torch.equal(inputs.labels, io["mm_labels"])
    assert torch.equal(inputs.attention_mask, io["mm_attention_mask"])
    assert torch.equal(inputs.position_ids, io["mm_position_ids"])


@every_case
def test_logits_and_loss_are_the_published_ones(case: str) -> None:
    model, io, images = recorded(case)
    with torch.no_grad():
        logits = model(io["input_ids"], images, io["attention_mask"])["logits"]
        loss = model(io["input_ids"], images, io["attention_mask"], io["labels"])["loss"]
    torch.testing.assert_close(logits, io["logits"], atol=goldens.LOSS_ATOL, rtol=0)
    torch.testing.assert_close(loss, io["loss"][0], atol=goldens.LOSS_ATOL, rtol=0)


@every_case
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_norm_is_the_published_one(case: str, checkpointing: bool) -> None:
    model, io, images = recorded(case)
    if checkpointing:
        model.projector.gradient_checkpointing_enable()
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        goldens.without_dropout(model)
    model(io["input_ids"], images, io["attention_mask"], io["labels"])["loss"].backward()
    expected = goldens.read_json(f"model/{CASES[case][0].parent.name}/{CASES[case][3]}.json")
    found = goldens.gradient_norms(model)
    assert len(found) == len(expected["param_norms"])
    assert found == pytest.approx(expected["param_norms"], rel=goldens.NORM_RTOL, abs=1e-6)
    group = [norm for name, norm in found.items() if "lora_A" in name]
    assert torch.tensor(group).norm().item() == pytest.approx(
        expected["group_norms"]["llm_lora_A"], rel=goldens.NORM_RTOL
    )


def test_the_published_mask_changes_the_loss_only_where_sub_images_are_seen() -> None:
    losses = {}
    for case in CASES:
        model, io, images = recorded(case)
        with torch.no_grad():
            loss = model(io["input_ids"], images, io["attention_mask"], io["labels"])["loss"]
        losses[case] = round(float(loss), 6)
    assert losses["released_published"] == losses["released_exact"]
    assert losses["crossattn_published"] == pytest.approx(6.301694, abs=goldens.LOSS_ATOL)
    assert losses["crossattn_exact"] == pytest.approx(6.300614, abs=goldens.LOSS_ATOL)


def test_the_zero2_folder_gives_the_same_model_in_half_precision() -> None:
    _, io, images = recorded("released_published")
    model = goldens.model(goldens.RELEASED_ZERO2)
    whole = goldens.model(goldens.RELEASED_PTH).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and ("lora_" in name or name.startswith("projector")):
            assert torch.equal(tensor, whole[name].to(torch.bfloat16).to(tensor.dtype)), name
    with torch.no_grad():
        output = model.encode_images(images)
        loss = model(io["input_ids"], images, io["attention_mask"], io["labels"])["loss"]
    # Rounding to bfloat16 (8 bits) moves each of the weights by up to 0.4 %.
    torch.testing.assert_close(output, io["projector_out"], atol=2e-2, rtol=0)
    torch.testing.assert_close(loss, io["loss"][0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("learned", ["recorded", "one", "everything", "nothing"])
def test_projecting_few_positions_gives_the_whole_loss(learned: str) -> None:
    model, io, images = recorded("crossattn_exact")
    ids, labels = io["input_ids"], io["labels"].clone()
    if learned == "one":
        labels[:] = IGNORE_INDEX
        labels[1, 20] = 7
    elif learned == "everything":
        labels = torch.where(io["attention_mask"] & (ids >= 0), ids, IGNORE_INDEX)
    elif learned == "nothing":
        labels[:] = IGNORE_INDEX
    inputs = model.prepare_inputs(ids, images, io["attention_mask"], labels)
    found = model.language_model_loss(inputs)
    found.backward()
    norms = goldens.gradient_norms(model)
    if learned == "nothing":
        assert found.item() == 0.0
        assert set(norms.values()) == {0.0}
        return
    model.zero_grad()
    inputs = model.prepare_inputs(ids, images, io["attention_mask"], labels)
    whole = model.llm(
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        labels=inputs.labels,
    ).loss
    whole.backward()
    torch.testing.assert_close(found, whole, atol=2e-6, rtol=0)
    assert norms == pytest.approx(goldens.gradient_norms(model), rel=1e-4, abs=1e-6)


def test_the_vocabulary_is_projected_where_something_is_learned() -> None:
    model, io, images = recorded("released_exact")
    shapes = []
    head = model.llm.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[1]))
    with torch.no_grad():
        model(io["input_ids"], images, io["attention_mask"], io["labels"])
    learned = (io["mm_labels"][:, 1:] != IGNORE_INDEX).any(dim=0).sum()
    assert shapes == [int(learned)]
    assert shapes[0] < io["mm_labels"].shape[1] / 2


def sample(*ids: int, image_sizes: tuple[int, ...] = (), seed: int = 0) -> dict[str, object]:
    """A sample whose labels are all its text, with one stack of tiles for each size."""
    input_ids = torch.tensor(ids)
    labels = torch.where(input_ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX, input_ids)
    images = [goldens.noise(1 + n, 3, 32, 32, seed=seed + n) for n in image_sizes]
    return {"input_ids": input_ids, "labels": labels, "pixel_values": images}


MIXED = (
    sample(0, IMAGE_TOKEN_INDEX, 9, 12, 33, image_sizes=(5,)),
    sample(0, 8, 7),
    sample(0, 5, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX, 11, image_sizes=(4, 8)),
    sample(0, 44, 45, 46, 47, 48, 49),
)


def collated(samples: tuple[dict[str, object], ...]) -> dict[str, object]:
    from pallava.default_collate_fn import default_collate_fn

    data = default_collate_fn(samples, return_hf_format=True)
    data.pop("position_ids")
    return data


def test_a_mixed_batch_gives_the_mean_over_its_tokens() -> None:
    model = goldens.model(goldens.CROSSATTN_STATE)
    with torch.no_grad():
        together = model(**collated(MIXED))["loss"]
        alone = torch.stack([model(**collated((one,)))["loss"] for one in MIXED])
    # The first token of a sample is predicted by nothing.
    weights = torch.tensor(
        [sum(label >= 0 for label in one["labels"][1:].tolist()) for one in MIXED]
    )
    torch.testing.assert_close(
        together, (alone * weights).sum() / weights.sum(), atol=goldens.LOSS_ATOL, rtol=0
    )


def test_a_pair_of_answers_to_one_wording_adds_the_odds_of_its_exchange() -> None:
    model = goldens.model(goldens.CROSSATTN_STATE)
    image = IMAGE_TOKEN_INDEX
    wording = 7 << ANSWER_BITS
    marks = {6: wording | 1, 11: wording | 2}
    asked = [
        sample(0, image, 5, answer, image_sizes=(3,), seed=seed)
        for seed, answer in ((1, 6), (2, 11), (3, 6))
    ]
    for one in asked:
        one["labels"] = torch.where(torch.arange(4) == 3, one["labels"], IGNORE_INDEX)  # type: ignore[call-overload]
    marked = [
        {**one, "label_marks": [0, 0, 0, marks[int(one["labels"][-1])]]}  # type: ignore[index]
        for one in asked
    ]
    unmarked = {**sample(0, image, 9, 12, image_sizes=(3,), seed=4)}  # as from another data set

    def loss(*samples: dict[str, object]) -> torch.Tensor:
        return model.language_model_loss(model.prepare_inputs(**collated(samples)))

    def negative_log(one: dict[str, object], answer: int) -> torch.Tensor:
        """Minus the logarithm of the probability of the answer."""
        labels = torch.tensor([IGNORE_INDEX] * 3 + [answer])
        return loss({**one, "labels": labels})

    with torch.no_grad():
        exchanges = [
            torch.nn.functional.softplus(
                negative_log(one, 6)
                + negative_log(asked[1], 11)
                - negative_log(one, 11)
                - negative_log(asked[1], 6)
            )
            for one in (asked[0], asked[2])
        ]
        expected = loss(*asked, unmarked) + CONTRAST_WEIGHT * sum(exchanges) / 2
        torch.testing.assert_close(
            loss(*marked, unmarked), expected, atol=goldens.LOSS_ATOL, rtol=0
        )
        # Neither the same answer twice nor two wordings make a pair.
        alike = (marked[0], marked[2])
        assert torch.equal(loss(*alike), loss(asked[0], asked[2]))
        marked[1]["label_marks"] = [0, 0, 0, (8 << ANSWER_BITS) | 2]
        assert torch.equal(loss(*marked), loss(*asked))


def test_the_contrast_does_not_depend_on_how_frequent_answers_are() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 20, generator=generator)
    targets = torch.tensor([3, 4, 3, 3, 4, 5])
    wording = 7 << ANSWER_BITS
    marks = torch.tensor([wording | 3, wording | 4, wording | 3, wording | 3, wording | 4, 0])
    prior = torch.zeros(20)
    prior[3] = 5.0
    plain, shifted = (contrast_loss(values, targets, marks) for values in (logits, logits + prior))
    torch.testing.assert_close(plain, shifted)
    # Images that say nothing leave even odds.
    nothing = contrast_loss(prior.expand(6, 20), targets, marks)
    torch.testing.assert_close(nothing, CONTRAST_WEIGHT * torch.tensor(2.0).log())


def test_each_image_of_a_conversation_takes_its_own_place() -> None:
    model = goldens.model(goldens.CROSSATTN_STATE)
    data = collated(MIXED)
    images = data["pixel_values"]
    assert [len(image) for image in images] == [6, 5, 9]
    with torch.no_grad():
        inputs = model.prepare_inputs(data["input_ids"], images, data["attention_mask"])
        tokens = [model.encode_images([image])[0] for image in images]
        word = model.llm.get_input_embeddings()(torch.tensor([6]))
    row = inputs.inputs_embeds[2]
    torch.testing.assert_close(inputs.inputs_embeds[0, 1:5], tokens[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(row[2:6], tokens[1], atol=5e-6, rtol=0)
    assert torch.equal(row[6:7], word)
    torch.testing.assert_close(row[7:11], tokens[2], atol=5e-6, rtol=0)
    assert inputs.attention_mask.sum(dim=1).tolist() == [4 + 4, 3, 4 + 8, 7]


@pytest.mark.parametrize("kind", [goldens.RELEASED_PTH, goldens.CROSSATTN_STATE])
def test_a_text_only_batch_gives_every_connector_parameter_a_zero_gradient(kind: Path) -> None:
    model = goldens.without_dropout(goldens.model(kind))
    model.projector.gradient_checkpointing_enable()
    text = (MIXED[1], MIXED[3])
    loss = model(**collated(text))["loss"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.projector.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert not any(gradient.any() for gradient in gradients.values())
    model.eval()
    with torch.no_grad():
        assert model(**collated(text))["loss"].item() == loss.item()


def test_a_frozen_encoder_and_checkpointing_leave_the_connector_its_gradients() -> None:
    model = goldens.without_dropout(goldens.model(goldens.CROSSATTN_STATE))
    model.projector.gradient_checkpointing_enable()
    model.visual_encoder.gradient_checkpointing_enable()
    model(**collated(MIXED))["loss"].backward()
    norms = goldens.gradient_norms(model.projector)
    assert len(norms) == len(list(model.projector.parameters()))
    silent = [name for name, norm in norms.items() if norm == 0.0]
    assert silent == []
    assert all(parameter.grad is None for parameter in model.visual_encoder.parameters())


def test_an_encoder_that_is_trained_gets_gradients() -> None:
    model = goldens.model(goldens.CROSSATTN_STATE)
    model.visual_encoder.requires_grad_(True)
    model(**collated(MIXED))["loss"].backward()
    layers = model.visual_encoder.vision_model.encoder.layers
    assert layers[1].mlp.fc2.weight.grad.any()
    assert layers[2].mlp.fc2.weight.grad is None  # above the selected layer


@pytest.mark.parametrize(("kind", "tiles"), [("released", 3), ("crossattn", 3 + 17)])
def test_sub_images_are_encoded_only_if_they_are_seen(kind: str, tiles: int) -> None:
    model = goldens.model(goldens.RELEASED_PTH if kind == "released" else goldens.CROSSATTN_STATE)
    batches = []
    embeddings = model.visual_encoder.vision_model.embeddings
    embeddings.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    with torch.no_grad():
        model(**collated(MIXED))
    assert sum(batches) == tiles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, r"3 image token\(s\) in the text but 0 image\(s\)"),
        ({"drop": 1}, r"3 image token\(s\) in the text but 2 image\(s\)"),
        ({"input_ids": None}, r"0 image token\(s\) in the text but 3 image\(s\)"),
    ],
)
def test_places_and_images_must_agree(changes: dict[str, object], message: str) -> None:
    model, data = goldens.model(goldens.CROSSATTN_STATE), collated(MIXED)
    if "drop" in changes:
        data["pixel_values"] = data["pixel_values"][1:]
    elif "input_ids" in changes:
        data["input_ids"] = data["input_ids"].clamp(min=0)
    else:
        data.pop("pixel_values")
    with pytest.raises(ValueError, match=message):
        model(**data)


def test_a_place_that_is_padding_is_no_place() -> None:
    ids = torch.tensor([[3, 4, IMAGE_TOKEN_INDEX]])
    spliced = splice(ids, torch.ones(1, 3, 2), torch.zeros(0, TOKENS, 2), ids >= 0)
    assert spliced.inputs_embeds.shape == (1, 2, 2)


rows_of_ids = st.lists(
    st.lists(st.sampled_from([1, 2, 3, IMAGE_TOKEN_INDEX]), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


@given(rows=rows_of_ids, tokens=st.integers(1, 3), padded_left=st.booleans())
@settings(deadline=None)
def test_padding_on_either_side_holds_the_same_samples(
    rows: list[list[int]], tokens: int, padded_left: bool
) -> None:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if padded_left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), True
    embeds = ids[..., None].float()  # each word's embedding is its id
    num_images = sum(row.count(IMAGE_TOKEN_INDEX) for row in rows)
    images = 100.0 + torch.arange(num_images * tokens).view(num_images, tokens, 1)
    remaining = iter(images.flatten().tolist())
    expected = []
    for row in rows:
        expected.append([])
        for token in row:
            is_image = token == IMAGE_TOKEN_INDEX
            expected[-1] += [next(remaining) for _ in range(tokens)] if is_image else [float(token)]
    for side in ("left", "right"):
        spliced = splice(ids, embeds, images, mask, labels=ids, padding_side=side)
        for index, wanted in enumerate(expected):
            shown = spliced.attention_mask[index]
            assert spliced.inputs_embeds[index, shown, 0].tolist() == wanted
            assert spliced.position_ids[index, shown].tolist() == list(range(len(wanted)))
            labels = [int(value) if value < 100 else IGNORE_INDEX for value in wanted]
            assert spliced.labels[index, shown].tolist() == labels
            assert spliced.labels[index, ~shown].eq(IGNORE_INDEX).all()
            assert not spliced.inputs_embeds[index, ~shown].any()
            edge = 0 if side == "right" else -1
            assert bool(shown[edge])


@pytest.mark.parametrize("mask", ["exact", "published"])
def test_one_image_alone_is_seen_alike_by_both_masks(mask: SubImageMask) -> None:
    image = goldens.noise(6, 3, 32, 32)
    expected = goldens.model(goldens.CROSSATTN_STATE).encode_images([image])
    assert torch.equal(
        goldens.model(goldens.CROSSATTN_STATE, mask).encode_images([image]), expected
    )


def test_a_thumbnail_without_sub_images_is_taken() -> None:
    model = goldens.model(goldens.CROSSATTN_STATE)
    images = [goldens.noise(1, 3, 32, 32), goldens.noise(5, 3, 32, 32)]
    with torch.no_grad():
        together = model.encode_images(images)
        alone = torch.cat([model.encode_images([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)
