"""Grouped attention gives what transformers' attention gives with repeated keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations import sdpa_attention

from pallava.inference.grouped_attention import share_keys_and_values

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 60,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 5},
    "Gemma3Text": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "SmolLM3": {"pad_token_id": 0},
}
LENGTHS = torch.tensor([[9], [4], [1]])


def make_llm(family: str, attention: str = "sdpa") -> Any:
    """A language model with random weights, the same for every attention."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def next_logits(llm: Any) -> torch.Tensor:
    """Logits after a padded prompt, and after each of two further tokens."""
    ids = torch.arange(27).reshape(3, 9)
    mask = (torch.arange(9) >= 9 - LENGTHS).long()
    states, found = DynamicCache(), []
    for step in range(3):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found.append(
            llm(ids, attention_mask=mask, position_ids=positions, past_key_values=states).logits
        )
        ids = torch.tensor([[30 + step], [40 + step], [50 + step]])
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.cat([logits[:, -1:] for logits in found], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_padded_rows_are_those_of_repeated_heads(family: str) -> None:
    expected = next_logits(make_llm(family))
    llm = make_llm(family)
    share_keys_and_values(llm)
    torch.testing.assert_close(next_logits(llm), expected, atol=1e-6, rtol=1e-5)


def test_only_the_prompt_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    repeat, lengths = sdpa_attention.repeat_kv, []

    def record(states: torch.Tensor, groups: int) -> torch.Tensor:
        lengths.append(states.shape[2])
        return repeat(states, groups)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", record)
    next_logits(make_llm("Llama"))
    assert set(lengths) == {9, 10, 11}
    lengths.clear()
    llm = make_llm("Llama")
    share_keys_and_values(llm)
    next_logits(llm)
    assert set(lengths) == {9}


def test_a_chosen_attention_stands() -> None:
    llm = make_llm("Llama", "eager")
    share_keys_and_values(llm)
    assert llm.config._attn_implementation == "eager"
