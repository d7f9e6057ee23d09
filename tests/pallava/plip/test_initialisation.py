import json

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPVisionConfig, CLIPVisionModel

from pallava.plip.initialisation import (
    build_caption_tokenizer,
    build_text_encoder,
    build_vision_encoder,
    load_caption_tokenizer,
    make_caption_tokenizer,
)

CAPTIONS = ["Dense nests of cells.", "Loose stroma, few cells", "Größe of nests"]
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
    "vocab_size": 50,
}


class TestTokenizer:
    def test_words_of_the_captions_are_whole(self):
        tokenizer = make_caption_tokenizer(CAPTIONS)
        tokens = tokenizer.tokenize("DENSE stroma, nests")
        assert tokens == ["dense", "stroma", ",", "nests"]
        ids = tokenizer("cells")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "cells", "[SEP]"]

    def test_unknown_words_are_spelled_and_unknown_letters_marked(self):
        tokenizer = make_caption_tokenizer(CAPTIONS)
        assert tokenizer.tokenize("fon") == ["f", "##o", "##n"]
        assert tokenizer.tokenize("\u6c34") == ["[UNK]"]

    def test_special_tokens_stand_where_the_text_encoder_expects_them(self):
        tokenizer = make_caption_tokenizer(CAPTIONS)
        assert tokenizer.pad_token_id == 0
        added = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
        assert added == [len(tokenizer) - 2, len(tokenizer) - 1]
        assert tokenizer("[ENC]")["input_ids"][1:-1] == added[1:]

    def test_it_is_the_same_in_every_process(self):
        first = make_caption_tokenizer(CAPTIONS, vocab_size=80)
        second = make_caption_tokenizer(reversed(CAPTIONS), vocab_size=80)
        assert first.get_vocab() == second.get_vocab()

    def test_the_limit_keeps_the_frequent_words(self):
        letters = len(make_caption_tokenizer(["a b"] * 9, vocab_size=100)) - 2
        tokenizer = make_caption_tokenizer(["aab"] * 9 + ["baa"], vocab_size=letters + 1)
        assert tokenizer.tokenize("aab baa") == ["aab", "b", "##a", "##a"]

    def test_nothing_to_learn_from_is_an_error(self):
        with pytest.raises(ValueError, match="no words"):
            make_caption_tokenizer([" "])
        with pytest.raises(ValueError, match="vocab_size 10"):
            make_caption_tokenizer(CAPTIONS, vocab_size=10)

    def test_from_a_bert_folder_and_from_pairs(self, tmp_path):
        make_caption_tokenizer(CAPTIONS).save_pretrained(tmp_path)
        loaded = load_caption_tokenizer(tmp_path)
        assert loaded.get_vocab() == make_caption_tokenizer(CAPTIONS).get_vocab()
        pairs = tmp_path / "pairs.jsonl"
        rows = [{"id": i, "image": "a.png", "caption": text} for i, text in enumerate(CAPTIONS)]
        pairs.write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
        made = build_caption_tokenizer({"pairs_file": str(pairs), "vocab_size": 500})
        assert made.get_vocab() == loaded.get_vocab()
        assert build_caption_tokenizer(str(tmp_path)).get_vocab() == loaded.get_vocab()

    def test_a_plain_bert_vocabulary_gets_both_tokens(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cells"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
        tokenizer = load_caption_tokenizer(tmp_path)
        assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [6, 7]


class TestEncoders:
    def test_vision_from_a_clip_folder(self, tmp_path):
        torch.manual_seed(0)
        clip = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
        clip.save_pretrained(tmp_path)
        encoder = build_vision_encoder(str(tmp_path)).eval()
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = clip(pixels, output_hidden_states=True).hidden_states
            found = encoder(pixels, output_hidden_states=True).hidden_states
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=0)

    def test_vision_and_text_from_sizes(self):
        assert build_vision_encoder(VISION).num_patches == 4
        text = build_text_encoder(TEXT, vocab_size=33, image_hidden_size=32)
        assert text.embeddings.word_embeddings.weight.shape == (33, 32)

    def test_text_from_a_bert_folder(self, tmp_path):
        BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
        text = build_text_encoder(tmp_path, vocab_size=52, image_hidden_size=20)
        assert text.embeddings.word_embeddings.weight.shape == (52, 32)
        assert text.encoder.layer[0].crossattention.self.key.weight.shape == (32, 20)

    @pytest.mark.parametrize("path", ["/absent/clip", "./clip", "data/plip/clip"])
    def test_an_absent_folder_is_not_looked_for_on_the_hub(self, path):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            build_vision_encoder(path)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            build_text_encoder(path, vocab_size=9, image_hidden_size=8)
