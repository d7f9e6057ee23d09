import copy
import json
from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertConfig, CLIPVisionConfig

from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.plip_text import PLIPTextEncoder
from pallava.plip.pretraining import EMPTY_SLOT, PLIPPretrainingModel

GOLDEN = Path(__file__).parents[2] / "golden" / "pallava" / "plip_pretrain"
QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue")
ORIGINAL = {"positives": "same_sample", "empty_slots": "negatives"}


def make_model(**options):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    torch.manual_seed(0)
    return PLIPPretrainingModel(
        PLIPVisionEncoder(CLIPVisionConfig(**expected["vision"])),
        PLIPTextEncoder(BertConfig(**{**expected["bert"], "vocab_size": 42}), 32),
        **{"enc_token_id": 40, "embed_dim": 16, "queue_size": 4, **options},
    )


def make_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(4, 40, (size, 6), generator=generator),
        "attention_mask": torch.ones(size, 6, dtype=torch.long),
        "caption_ids": torch.arange(size),
    }


@pytest.fixture(scope="module")
def golden():
    io = load_file(GOLDEN / "io.safetensors")
    batch = {
        "pixel_values": io["image"],
        "input_ids": io["input_ids"],
        "attention_mask": io["attention_mask"],
        "caption_ids": io["idx"],
    }
    return json.loads((GOLDEN / "expected.json").read_text()), batch, io


def load_golden(**options):
    model = make_model(**{**ORIGINAL, **options})
    model.load_state_dict(load_file(GOLDEN / "weights_before.safetensors"), strict=True)
    return model.train()


class TestParity:
    def test_losses_queues_and_gradients(self, golden):
        expected, batch, io = golden
        model = load_golden()
        output = model(**batch)
        assert output.loss_ita.item() == pytest.approx(expected["loss_ita"], abs=1e-5)
        assert output.loss_itm.item() == pytest.approx(expected["loss_itm"], abs=1e-5)
        for name in QUEUES:
            found = getattr(model, name)
            assert found.dtype == io[f"{name}_after"].dtype
            torch.testing.assert_close(found, io[f"{name}_after"], atol=2e-6, rtol=0)
        output.loss.backward()
        norms = {
            name: torch.stack([p.grad.norm() for p in parameters]).norm().item()
            for name, parameters in parts(model, expected["grad_norms"])
        }
        assert norms == pytest.approx(expected["grad_norms"], rel=1e-4)

    def test_padding_to_the_longest_of_the_batch_is_enough(self, golden):
        expected, batch, _ = golden
        length = int(batch["attention_mask"].sum(1).max())
        assert length < batch["input_ids"].shape[1]
        short = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}
        output = load_golden()(**{**batch, **short})
        assert output.loss_ita.item() == pytest.approx(expected["loss_ita"], abs=1e-5)
        assert output.loss_itm.item() == pytest.approx(expected["loss_itm"], abs=1e-5)

    def test_names_and_shapes_of_the_full_size(self, golden):
        """The golden weights are the published layout at a small size."""
        weights = load_file(GOLDEN / "weights_before.safetensors")
        found = {name: tuple(tensor.shape) for name, tensor in make_model().state_dict().items()}
        assert found == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def parts(model, names):
    for name in names:
        part = getattr(model, name)
        yield name, [part] if isinstance(part, torch.Tensor) else list(part.parameters())


class TestMomentum:
    def test_gradients_reach_models_and_never_copies(self):
        model = make_model().train()
        model(**make_batch(4)).loss.backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert without == {name for name in without if name.split(".")[0].endswith("_m")}
        assert without == {n for n, p in model.named_parameters() if not p.requires_grad}

    def test_copies_move_by_their_share(self):
        model = make_model(momentum=0.9).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = {name: p.clone() for name, p in model.named_parameters()}
        model.update_momentum_copies()
        after = dict(model.named_parameters())
        for name in before:
            head, _, tail = name.partition(".")
            if head.endswith("_m"):
                expected = 0.9 * before[name] + 0.1 * before[f"{head[:-2]}.{tail}"]
                torch.testing.assert_close(after[name].data, expected)
            else:
                torch.testing.assert_close(after[name], before[name], atol=0, rtol=0)

    def test_copies_start_equal(self):
        state = make_model().state_dict()
        copies = [name for name in state if name.split(".")[0].endswith("_m")]
        assert copies
        for name in copies:
            head, _, tail = name.partition(".")
            assert torch.equal(state[name], state[f"{head[:-2]}.{tail}"])

    def test_evaluation_changes_nothing(self):
        model = make_model().eval()
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model(**make_batch(3))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name


class TestQueue:
    @settings(max_examples=40, deadline=None)
    @given(queue_size=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
    def test_holds_the_latest_in_place(self, queue_size, sizes):
        """Whatever batch sizes come, also larger than the queue and not dividing it."""
        model = _Queues.of(queue_size)
        latest, count = deque(maxlen=queue_size), 0
        slots = [EMPTY_SLOT] * queue_size
        for size in sizes:
            ids = torch.arange(count, count + size)
            feats = F.normalize(torch.randn(size, 16), dim=1)
            model.enqueue(feats, -feats, ids)
            latest.extend(zip(ids.tolist(), feats, strict=True))
            for index in ids.tolist():
                slots[index % queue_size] = index
            count += size
        assert model.idx_queue[0].tolist() == slots
        assert model.ptr_queue.tolist() == [count % queue_size]
        for index, feat in latest:
            slot = index % queue_size
            assert torch.equal(model.image_queue[:, slot], feat)
            assert torch.equal(model.text_queue[:, slot], -feat)
        norms = model.image_queue.norm(dim=0)
        torch.testing.assert_close(norms, torch.ones(queue_size))

    def test_a_step_wraps_around_where_the_original_stops(self):
        model = make_model(queue_size=5).train()
        for step in range(3):
            batch = make_batch(3, seed=step)
            model(**{**batch, "caption_ids": torch.arange(3) + 3 * step})
        assert model.idx_queue[0].tolist() == [5, 6, 7, 8, 4]
        assert model.ptr_queue.item() == 4

    def test_empty_slots_can_be_ignored(self):
        losses = {}
        for empty_slots in ("ignored", "negatives"):
            for seed in (1, 2):
                model = make_model(empty_slots=empty_slots).train()
                generator = torch.Generator().manual_seed(seed)
                queue = F.normalize(torch.randn(16, 4, generator=generator), dim=0)
                model.image_queue.copy_(queue)
                model.text_queue.copy_(queue)
                losses[empty_slots, seed] = model(**make_batch(3)).loss_ita.item()
        assert losses["ignored", 1] == losses["ignored", 2]
        assert losses["negatives", 1] != losses["negatives", 2]


class _Queues:
    """Models by queue size, made once: hypothesis asks for many."""

    made = {}

    @classmethod
    def of(cls, queue_size):
        if queue_size not in cls.made:
            cls.made[queue_size] = make_model(queue_size=queue_size)
        model = cls.made[queue_size]
        model.idx_queue.fill_(EMPTY_SLOT)
        model.ptr_queue.zero_()
        return model


class TestPositives:
    def test_equal_captions_are_positives_in_step_and_queue(self):
        model = make_model(queue_size=6, alpha=0.0).train()
        model(**{**make_batch(4, seed=1), "caption_ids": torch.tensor([7, 8, 7, 9])})
        batch = {**make_batch(3, seed=2), "caption_ids": torch.tensor([7, 3, 7])}
        expected = _loss_by_definition(model, batch)
        output = model(**batch)
        assert output.loss_ita.item() == pytest.approx(expected, abs=1e-5)

    def test_they_are_negatives_as_in_the_original(self):
        batch = {**make_batch(3), "caption_ids": torch.tensor([7, 3, 7])}
        other = {**batch, "caption_ids": torch.tensor([1, 2, 3])}
        original = make_model(**ORIGINAL).train()
        corrected = make_model().train()
        losses = [copy.deepcopy(original)(**each).loss_ita.item() for each in (batch, other)]
        assert losses[0] == losses[1]
        losses = [copy.deepcopy(corrected)(**each).loss_ita.item() for each in (batch, other)]
        assert losses[0] != losses[1]

    @pytest.mark.parametrize("size", [1, 3])
    def test_without_any_negative_matching_learns_from_the_pairs_alone(self, size):
        model = make_model().train()
        batch = {**make_batch(size), "caption_ids": torch.zeros(size, dtype=torch.long)}
        output = model(**batch)
        output.loss.backward()
        assert torch.isfinite(output.loss)
        # Nothing says "no match": the gradient pushes towards "match" only.
        assert model.itm_head.bias.grad[1] < 0 < model.itm_head.bias.grad[0]

    def test_negatives_never_carry_the_same_caption(self, monkeypatch):
        model = make_model().train()
        seen = []
        encode = model.text_encoder.forward

        def spy(input_ids, attention_mask, *image):
            if image:
                seen.append((input_ids, image[1]))
            return encode(input_ids, attention_mask, *image)

        monkeypatch.setattr(model.text_encoder, "forward", spy)
        ids = torch.tensor([0, 1, 0, 1])
        batch = {**make_batch(4), "caption_ids": ids}
        for _ in range(20):
            model(**batch)
        for texts, image_index in seen:
            own = batch["input_ids"].clone()
            own[:, 0] = 40
            assert torch.equal(texts[:8], torch.cat([own, own]))
            assert image_index[:4].tolist() == image_index[8:].tolist() == [0, 1, 2, 3]
            assert (ids[image_index[4:8]] != ids).all()
            for row, text in enumerate(texts[8:]):
                source = (own == text).all(dim=1).nonzero()[:, 0]
                assert (ids[source] != ids[row]).all()


def _loss_by_definition(model, batch):
    """ITC with multi-positives, alpha 0, written out row by row."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.update_momentum_copies()
        image_m = model._features(batch["pixel_values"], momentum=True)
        text_m = model._features(batch["input_ids"], batch["attention_mask"], momentum=True)
        image = model.encode_image(batch["pixel_values"])
        text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    filled = model.idx_queue[0] != EMPTY_SLOT
    ids = torch.cat([batch["caption_ids"], model.idx_queue[0, filled]])
    total = 0.0
    for feats, inside, queue in (
        (image, text_m, model.text_queue),
        (text, image_m, model.image_queue),
    ):
        others = torch.cat([inside, queue[:, filled].T])
        for row, own in zip(feats, batch["caption_ids"], strict=True):
            log_probs = (others @ row / model.temp.detach()).log_softmax(0)
            total -= log_probs[ids == own].mean().item()
    return total / (2 * len(image))


class TestPrecision:
    def test_autocast_keeps_losses_and_queues_in_fp32(self):
        model = make_model().train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**make_batch(4))
        assert output.loss_ita.dtype == output.loss_itm.dtype == torch.float32
        reference = make_model().train()(**make_batch(4))
        assert output.loss_ita.item() == pytest.approx(reference.loss_ita.item(), rel=0.05)
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    def test_a_bfloat16_model_keeps_queues_and_copies_in_fp32(self):
        model = make_model().bfloat16().train()
        assert model.vision_proj.weight.dtype == torch.bfloat16
        before = model.vision_proj_m.weight.clone()
        with torch.no_grad():
            model.vision_proj.weight.add_(before.bfloat16() * 0.01)
        output = model(**make_batch(4))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        for name in ("image_queue", "text_queue"):
            assert getattr(model, name).dtype == torch.float32
        copies = [p for name, p in model.named_parameters() if name.split(".")[0].endswith("_m")]
        assert {p.dtype for p in copies} == {torch.float32}
        # 0.005 of 1 %: lost in bfloat16.
        moved = (model.vision_proj_m.weight - before).abs()
        assert 0 < moved.max() < 1e-4 * before.abs().max()

    def test_the_temperature_stays_within_its_limits(self):
        model = make_model()
        for start, expected in ((0.0, 0.001), (3.0, 0.5)):
            model.temp.data.fill_(start)
            model(**make_batch(2))
            assert model.temp.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positives": "all"}, "positives 'all': expected one of 'same_sample', 'same_caption_id'"),
        ({"empty_slots": "x"}, "empty_slots 'x'"),
        ({"momentum": 1.5}, "momentum 1.5"),
        ({"alpha": -0.1}, "alpha -0.1"),
        ({"queue_size": 0}, "queue_size 0"),
        ({"enc_token_id": 42}, "enc_token_id 42 is outside the text encoder's vocabulary of 42"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_caption_ids_are_required_where_they_matter():
    batch = make_batch(2)
    del batch["caption_ids"]
    with pytest.raises(ValueError, match="caption_ids"):
        make_model()(**batch)
    output = make_model(**ORIGINAL).train()(**batch)
    assert torch.isfinite(output.loss)
