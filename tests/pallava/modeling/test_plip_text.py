import pytest
import torch
from transformers import BertConfig, BertModel, BlipTextConfig, BlipTextModel

from pallava.modeling.plip_text import PLIPTextEncoder
from pathcore.weights import CheckpointError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
IMAGE_HIDDEN_SIZE = 24
IDS = torch.tensor([[2, 11, 12, 3, 0], [2, 21, 3, 0, 0], [2, 7, 8, 9, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = PLIPTextEncoder(BertConfig(**SIZES), IMAGE_HIDDEN_SIZE).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("with_image", [False, True])
def test_agrees_with_transformers_blip(encoder, with_image):
    config = BlipTextConfig(
        **SIZES, encoder_hidden_size=IMAGE_HIDDEN_SIZE, hidden_act="gelu", is_decoder=True
    )
    reference = BlipTextModel(config, add_pooling_layer=False).eval()
    missing, unexpected = reference.load_state_dict(encoder.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["embeddings.position_ids"])
    image = torch.randn(3, 7, IMAGE_HIDDEN_SIZE) if with_image else None
    with torch.no_grad():
        expected = reference(
            IDS, MASK, encoder_hidden_states=image, is_decoder=False
        ).last_hidden_state
        found = encoder(IDS, MASK, image)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], atol=2e-6, rtol=0)


def test_an_image_may_serve_several_texts(encoder):
    images = torch.randn(2, 7, IMAGE_HIDDEN_SIZE)
    index = torch.tensor([1, 0, 1])
    torch.testing.assert_close(
        encoder(IDS, MASK, images, index), encoder(IDS, MASK, images[index]), atol=1e-6, rtol=0
    )


def test_padding_changes_nothing(encoder):
    alone = encoder(IDS[1:2, :3], MASK[1:2, :3])
    padded = encoder(IDS, MASK)[1:2, :3]
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_starts_as_the_bert_it_is_given(tmp_path, name):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES, initializer_range=0.3)).eval()
    bert.save_pretrained(tmp_path, safe_serialization=name.endswith("safetensors"))
    assert (tmp_path / name).is_file()
    encoder = PLIPTextEncoder.from_bert(tmp_path, vocab_size=42, image_hidden_size=24).eval()
    assert encoder.embeddings.word_embeddings.weight.shape == (42, 32)
    with torch.no_grad():
        expected = bert(IDS, MASK).last_hidden_state
        torch.testing.assert_close(
            encoder(IDS, MASK)[MASK.bool()], expected[MASK.bool()], atol=2e-6, rtol=0
        )
        dropped = PLIPTextEncoder.from_bert(
            tmp_path, vocab_size=42, image_hidden_size=24, fold_segment=False
        ).eval()
        assert (dropped(IDS, MASK) - expected).abs().max() > 0.01


def test_refuses_a_tokenizer_smaller_than_the_bert(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="40 tokens in the BERT, 39 in the tokenizer"):
        PLIPTextEncoder.from_bert(tmp_path, vocab_size=39, image_hidden_size=24)


def test_refuses_a_bert_with_other_parts(tmp_path):
    # Relative positions add parameters that a PLIP text encoder does not have.
    config = BertConfig(**SIZES, position_embedding_type="relative_key")
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="distance_embedding"):
        PLIPTextEncoder.from_bert(tmp_path, vocab_size=40, image_hidden_size=24)


def test_refuses_a_bert_without_all_its_weights(tmp_path):
    BertModel(BertConfig(**SIZES | {"num_hidden_layers": 1})).save_pretrained(tmp_path)
    BertConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: encoder\.layer\.1\."):
        PLIPTextEncoder.from_bert(tmp_path, vocab_size=40, image_hidden_size=24)


def test_names_the_limit_of_positions(encoder):
    with pytest.raises(ValueError, match="17 tokens, the text encoder 16 positions"):
        encoder(torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17))


def test_heads_must_divide_the_width():
    with pytest.raises(
        ValueError, match="hidden_size 32 is not a multiple of num_attention_heads 5"
    ):
        PLIPTextEncoder(BertConfig(**{**SIZES, "num_attention_heads": 5}), 24)
