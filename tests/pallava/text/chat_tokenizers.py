"""Tokenizers of today's families: small vocabularies, with each family's special tokens and format.

The chat templates restate what the published ones render, with what is peculiar to each: who writes
the BOS, which system block is always there, what is trimmed, today's date, empty thoughts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Is fibrosis shown? Where, on the left?\n\nYes, a little. In the stroma. No. Is it red? yes no"
]

LLAMA3 = """{{ bos_token }}{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- if date_string is not defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' -}}
{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}"""

QWEN25 = """{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant of this test.<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

QWEN3 = """{%- set last = namespace(user=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > last.user -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{{- content + '<|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"""

GEMMA3 = """{{ bos_token }}{%- if messages[0].role == 'system' -%}
{%- set first = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- endif -%}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' -}}
{{- first if loop.first else '' -}}{{- m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""

MISTRAL = """{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\n\n' -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' -}}
{%- else -%}{{- ' ' + m.content | trim + eos_token -}}{%- endif -%}
{%- endfor -%}"""

PHI4 = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}"""

SMOLLM3 = """{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}
{%- endif -%}
{%- set today = strftime_now('%d %B %Y') -%}
{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + today + '\nReasoning Mode: ' -}}
{{- '/think' if enable_thinking else '/no_think' -}}
{%- if messages[0].role == 'system' -%}{{- '\n\n' + messages[0].content.rstrip() -}}
{%- set messages = messages[1:] -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' and not enable_thinking -%}
{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if not enable_thinking -%}{{- '<think>\n\n</think>\n' -}}{%- endif -%}{%- endif -%}"""

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_WORDS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA_WORDS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
# (chat template, special tokens, BOS, EOS, pad, tokens of which the tokenizer is made)
FAMILIES: dict[str, tuple[str, list[str], str | None, str, str | None, str]] = {
    "llama31": (LLAMA3, LLAMA_WORDS, "<|begin_of_text|>", "<|eot_id|>", None, "bytes"),
    "qwen25": (QWEN25, CHATML, None, "<|im_end|>", "<|endoftext|>", "bytes"),
    "qwen3": (QWEN3, CHATML, None, "<|im_end|>", "<|endoftext|>", "bytes"),
    "gemma3": (GEMMA3, GEMMA_WORDS, "<bos>", "<eos>", "<pad>", "pieces"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", None, "prefixed"),
    # The format of Mistral 7B v0.1, whose [INST] is plain text.
    "mistral_plain": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>", None, "prefixed"),
    # A BOS that the template does not write, and pad = EOS in early files.
    "phi4": (PHI4, [*CHATML, "<|im_sep|>"], "<|endoftext|>", "<|im_end|>", "<|im_end|>", "bytes"),
    "smollm2": (QWEN25, CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", "bytes"),
    "smollm3": (SMOLLM3, CHATML, None, "<|im_end|>", "<|im_end|>", "bytes"),
}


@cache
def chat_tokenizer(family: str) -> Any:
    """A tokenizer that encodes and renders as the family's does."""
    jinja, words, bos, eos, pad, kind = FAMILIES[family]
    special = [AddedToken(word, special=True, normalized=False) for word in words]
    core = Tokenizer(models.BPE(byte_fallback=False))
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        scheme = "always" if kind == "prefixed" else "never"
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
        alphabet = [chr(code) for code in (10, *range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=jinja
    )
