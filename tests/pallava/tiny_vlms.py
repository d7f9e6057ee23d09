"""Stock models of transformers, tiny, saved with their processors: LLaVA and Qwen2-VL."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.pallava.goldens import TINY_LLAMA

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant:"
)


def write_llava(folder: Path) -> Path:
    """Saves model and processor; returns the folder."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = AutoTokenizer.from_pretrained(TINY_LLAMA)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=2, image_size=32, patch_size=16)  # fmt: skip
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=2, vocab_size=len(words),
                       max_position_embeddings=2048)  # fmt: skip
    config = LlavaConfig(
        vision, text, image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, words, patch_size=16, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_qwen2_vl(folder: Path) -> Path:
    """Saves a model whose number of image tokens depends on the size of the image."""
    from transformers import (
        AutoTokenizer,
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    raw = AutoTokenizer.from_pretrained(TINY_LLAMA)
    words = Qwen2TokenizerFast(
        tokenizer_object=raw.backend_tokenizer, bos_token=raw.bos_token, eos_token=raw.eos_token,
        pad_token=raw.eos_token, unk_token=raw.unk_token,
    )  # fmt: skip
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_special_tokens({"additional_special_tokens": marks})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=len(words), max_position_embeddings=2048,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2,
                       "patch_size": 14, "mlp_ratio": 2},
        eos_token_id=words.eos_token_id,
        **dict(zip(names, words.convert_tokens_to_ids(marks), strict=True)),
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56), words,
        Qwen2VLVideoProcessor(), chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder
