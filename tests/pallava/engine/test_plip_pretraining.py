"""Unit tests of PLIP pretraining in XTuner, without a training run."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from pallava.engine.plip_pretraining import (
    AlphaRampHook,
    CaptionVocabularyHook,
    MatrixDecayAdamW,
    PairTrainLoop,
    PLIPPairDataset,
    PLIPPretraining,
    SaveEncoderHook,
    collate_pairs,
)
from pallava.modeling.folders import load_vision_encoder
from pathcore.weights import CheckpointError

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
CAPTIONS = ("red cells", "green cells in a very long row of words that is cut", "blue")


@pytest.fixture
def pairs(tmp_path):
    colours = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
    rows = []
    for index, (colour, caption) in enumerate(zip(colours, CAPTIONS, strict=True)):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"id": index, "image": f"{index}.png", "caption": caption}))
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(rows))
    return file


@pytest.fixture
def make_model(pairs):
    def make(**options):
        torch.manual_seed(0)
        defaults = {"embed_dim": 8, "queue_size": 8, "max_length": 10}
        tokenizer = {"pairs_file": pairs, "vocab_size": 200}
        return PLIPPretraining(VISION, TEXT, tokenizer, **{**defaults, **options})

    return make


def batch_of(pairs, log):
    dataset = PLIPPairDataset(pairs, image_size=32, skip_log=log)
    return collate_pairs([dataset[index] for index in range(len(dataset))])


def test_a_step_from_bytes_and_text(make_model, pairs, tmp_path):
    model = make_model().train()
    model.init_weights()
    losses = model(**batch_of(pairs, tmp_path / "log"))
    total, logged = model.parse_losses(losses)
    assert total.requires_grad
    assert logged["loss"].item() == pytest.approx(
        (losses["loss_ita"] + losses["loss_itm"]).item(), abs=1e-6
    )
    assert set(logged) >= {"loss_ita", "loss_itm", "itm_accuracy", "itc_accuracy", "temperature"}
    assert model.ptr_queue.item() == 3


def test_features_for_retrieval(make_model, pairs, tmp_path):
    model = make_model().eval()
    feats = model(**batch_of(pairs, tmp_path / "log"), mode="predict")
    for name in ("image_feats", "text_feats"):
        torch.testing.assert_close(feats[name].norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="mode 'tensor'"):
        model(**batch_of(pairs, tmp_path / "log"), mode="tensor")


def test_text_is_padded_to_the_longest_and_cut(make_model):
    model = make_model()
    assert model.tokenise(CAPTIONS[:1])["input_ids"].shape == (1, 4)
    assert model.tokenise(CAPTIONS)["input_ids"].shape == (3, 10)


def test_state_dict_holds_the_published_names_alone(make_model):
    names = {name.split(".")[0] for name in make_model().state_dict()}
    trained = {"visual_encoder", "text_encoder", "vision_proj", "text_proj"}
    queues = {"image_queue", "text_queue", "idx_queue", "ptr_queue"}
    assert names == trained | {f"{name}_m" for name in trained} | queues | {"itm_head", "temp"}


def test_starts_from_an_earlier_run(make_model, tmp_path):
    first = make_model()
    torch.nn.init.normal_(first.vision_proj.weight)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "iter_1.pth")
    second = make_model(pretrained_pth=tmp_path / "iter_1.pth")
    assert torch.equal(second.vision_proj.weight, first.vision_proj.weight)
    partial = {k: v for k, v in first.state_dict().items() if not k.startswith("itm_head")}
    torch.save({"state_dict": partial}, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=r"2 missing[\s\S]*itm_head\.weight"):
        make_model(pretrained_pth=tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match="2 missing"):  # as MMEngine's load_from does
        second.load_state_dict(partial, strict=False)


def test_a_checkpoint_of_other_words_is_refused(make_model, pairs, tmp_path):
    hook, checkpoint = CaptionVocabularyHook(), {"state_dict": make_model().state_dict()}
    hook.before_save_checkpoint(SimpleNamespace(model=make_model()), checkpoint)
    torch.save(checkpoint, tmp_path / "iter_1.pth")
    make_model(pretrained_pth=tmp_path / "iter_1.pth")
    hook.after_load_checkpoint(SimpleNamespace(model=make_model()), checkpoint)

    rows = pairs.read_text().replace("red cells", "cells der")  # the same letters and words' number
    pairs.write_text(rows)
    other = make_model()
    other.load_state_dict(checkpoint["state_dict"])  # all shapes fit
    with pytest.raises(CheckpointError, match=r"iter_1\.pth was trained with another vocabulary"):
        make_model(pretrained_pth=tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError, match=r"model\.tokenizer\.pairs_file"):
        hook.after_load_checkpoint(SimpleNamespace(model=other), checkpoint)
    del checkpoint["meta"]  # as checkpoints of earlier versions
    hook.after_load_checkpoint(SimpleNamespace(model=other), checkpoint)


def test_from_scratch_a_tokenizer_must_be_named():
    with pytest.raises(ValueError, match="tokenizer=dict"):
        PLIPPretraining(VISION, TEXT)


def test_gradient_checkpointing_gives_the_same_gradient(make_model, pairs, tmp_path):
    batch = batch_of(pairs, tmp_path / "log")
    gradients = []
    for checkpointing in (False, True):
        model = make_model(gradient_checkpointing=checkpointing).train()
        for dropout in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
            dropout.p = 0.0
        for attention in [m for m in model.modules() if hasattr(m, "dropout")]:
            if isinstance(attention.dropout, float):
                attention.dropout = 0.0
        torch.manual_seed(1)
        losses = model(**batch)
        (losses["loss_ita"] + losses["loss_itm"]).backward()
        gradients.append(model.visual_encoder.vision_model.embeddings.class_embedding.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_alpha_rises_over_the_first_epoch(make_model):
    model = make_model(alpha=0.4)
    hook = AlphaRampHook(ramp_epochs=0.5)
    wrapped = SimpleNamespace(module=SimpleNamespace(module=model))
    seen = []
    for step in range(8):
        runner = SimpleNamespace(model=wrapped, iter=step, train_dataloader=range(8))
        hook.before_train_iter(runner, step)
        seen.append(model.alpha)
    assert seen == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])
    resumed = AlphaRampHook(ramp_epochs=0.5)
    fresh = make_model(alpha=0.4)
    resumed.before_train_iter(
        SimpleNamespace(model=fresh, iter=2, train_dataloader=range(8)), batch_idx=2
    )
    assert fresh.alpha == pytest.approx(0.2)


def test_the_encoder_is_saved_with_its_normalisation(make_model, tmp_path):
    model = make_model(image_mean=(0.7, 0.6, 0.8), image_std=(0.1, 0.2, 0.3))
    runner = SimpleNamespace(model=model, work_dir=str(tmp_path))
    SaveEncoderHook().before_save_checkpoint(runner, {})
    processor = json.loads((tmp_path / "plip_encoder" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == pytest.approx([0.7, 0.6, 0.8])
    assert processor["image_std"] == pytest.approx([0.1, 0.2, 0.3])
    loaded = load_vision_encoder(tmp_path / "plip_encoder")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.visual_encoder.state_dict()[name])


def test_decay_leaves_vectors_and_the_temperature_alone(make_model):
    model = make_model()
    optimizer = MatrixDecayAdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert any(parameter is model.temp for parameter in spared["params"])
    held = len(decayed["params"]) + len(spared["params"])
    assert held == sum(parameter.requires_grad for parameter in model.parameters())


def test_data_that_make_no_batch_are_named(pairs, tmp_path):
    dataset = PLIPPairDataset(pairs, image_size=32, skip_log=tmp_path / "log")
    loader = DataLoader(dataset, batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="3 pairs do not fill a batch on 1 device"):
        PairTrainLoop(SimpleNamespace(), loader, max_epochs=1)


def test_deepspeed_is_refused(pairs, tmp_path):
    dataset = PLIPPairDataset(pairs, image_size=32, skip_log=tmp_path / "log")
    runner = SimpleNamespace(strategy=type("DeepSpeedStrategy", (), {})())
    with pytest.raises(ValueError, match="without --deepspeed"):
        PairTrainLoop(runner, DataLoader(dataset), max_epochs=1)
