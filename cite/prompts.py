"""Visual prompts: trained vectors that are inserted into a frozen transformer.

As in CITE (Zhang et al. 2023, https://arxiv.org/abs/2307.14901), after "Visual Prompt Tuning" (Jia
et al. 2022, https://arxiv.org/abs/2203.12119).

Shapes: E prompted layers, L prompts per layer, D width, B images, T tokens of an image, of which
the first are prefix tokens (class token, registers).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn

Position = Literal["prepend", "add"]
Initialisation = Literal["uniform", "normal", "zero", "kaiming", "token"]

UNIFORM_BOUND = 0.08
NORMAL_STD = 0.02
"""Initialisations of the published code of CITE (github.com/Yunkun-Zhang/CITE)."""


@dataclass(frozen=True)
class PromptSpec:
    """Number, position and initialisation of prompts.

    Attributes:
        length: Number L of prompts per prompted layer; 0 for none.
        layers: Indices of the blocks before which prompts are inserted, ascending. The i-th entry
            uses the i-th row of the prompt tensor.
        position: `prepend` inserts prompts between prefix tokens and patch tokens; later prompted
            layers replace them. `add` adds prompt t mod L to patch token t; the last N mod L of N
            patch tokens and the prefix tokens remain unchanged.
        init: `uniform`, `normal`, `zero`, `kaiming`, or `token` for the mean of the embedded tokens
            of the first batch, over all ranks.
        noise_std: Standard deviation of normal noise added to the initial prompts. With `token`,
            all prompts start equal; if they are prepended, they also get equal gradients and stay
            equal without noise.
    """

    length: int = 0
    layers: tuple[int, ...] = (0,)
    position: Position = "prepend"
    init: Initialisation = "normal"
    noise_std: float = 0.0

    @classmethod
    def from_arguments(
        cls,
        length: int = 0,
        layers: Sequence[int] | None = None,
        position: str = "prepend",
        init: str = "normal",
        noise_std: float = 0.0,
        *,
        num_blocks: int,
    ) -> PromptSpec:
        """Builds a spec from the arguments of a config and checks them.

        Raises:
            ValueError: If an argument is invalid, or a layer does not exist.
        """
        entries = (0,) if layers is None else tuple(int(layer) for layer in layers)
        if length < 0:
            raise ValueError(f"prompt_length {length}: expected 0 (no prompts) or more")
        if position not in get_args(Position):
            raise ValueError(f"prompt_pos {position!r}: expected one of {get_args(Position)}")
        if init not in get_args(Initialisation):
            raise ValueError(f"prompt_init {init!r}: expected one of {get_args(Initialisation)}")
        if noise_std < 0:
            raise ValueError(f"prompt_noise_std {noise_std}: expected 0 or more")
        ascending = all(a < b for a, b in itertools.pairwise(entries))
        if not entries or not ascending or not 0 <= entries[0] <= entries[-1] < num_blocks:
            raise ValueError(
                f"prompt_layers {list(entries)}: different blocks in ascending order, from 0 to "
                f"{num_blocks - 1}, expected (None for the first alone)"
            )
        return cls(length, entries, position, init, noise_std)  # type: ignore[arg-type]


class Prompts(nn.Module):
    """The prompt tensor `(E, L, D)`, with its initialisation and insertion.

    The flag `prompt_initialised` is part of the state dict, so that token initialisation happens
    only once. The published code lacks it and adds the mean token again after loading, in tests and
    when a run is resumed. Its state dicts contain prompts that are initialised.

    Args:
        spec: Number, position and initialisation; its length is 1 or more.
        width: Width D of the tokens.

    Example:
        >>> prompts = Prompts(PromptSpec(length=4, layers=(0, 2)), width=8)
        >>> prompts.enter(torch.zeros(2, 17, 8), layer=0, num_prefix=1).shape
        torch.Size([2, 21, 8])
    """

    prompt_initialised: Tensor

    def __init__(self, spec: PromptSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.prompt = nn.Parameter(_initial_value(spec, width))
        self.register_buffer("prompt_initialised", torch.tensor(spec.init != "token"))
        self._checked = False

    @property
    def checked(self) -> bool:
        """Whether prompts are known to be initialised.

        Unlike reading the buffer, this does not wait for a GPU.
        """
        return self._checked

    def initialise(self, tokens: Tensor) -> None:
        """Adds the mean token to all prompts, unless they are initialised.

        All ranks must call this together, as in the first forward pass of a training. The mean is
        taken over the batches of all ranks; otherwise ranks would train different prompts.

        Args:
            tokens: Embedded images `(B, T, D)`.
        """
        if self._checked:
            return
        if not bool(self.prompt_initialised):
            with torch.no_grad():
                self.prompt.add_(_mean_over_ranks(tokens).to(self.prompt))
                self.prompt_initialised.fill_(True)
        self._checked = True

    def enter(self, hidden_states: Tensor, layer: int, num_prefix: int) -> Tensor:
        """Inserts the prompts of a layer into its input.

        Args:
            hidden_states: `(B, T, D)`, or `(B, T + L, D)` after the first prompted layer of
                `prepend`.
            layer: Index of the next block.
            num_prefix: Number of prefix tokens.

        Returns:
            `(B, T + L, D)` for `prepend` from the first prompted layer on, else `(B, T, D)`.
        """
        if layer not in self.spec.layers:
            return hidden_states
        prompt = self.prompt[self.spec.layers.index(layer)].to(hidden_states.dtype)
        if self.spec.position == "add":
            return self._add(hidden_states, prompt, num_prefix)
        is_first = layer == self.spec.layers[0]
        patches = hidden_states[:, num_prefix if is_first else num_prefix + self.spec.length :]
        prompts = prompt.expand(len(hidden_states), -1, -1)
        return torch.cat([hidden_states[:, :num_prefix], prompts, patches], dim=1)

    def _add(self, hidden_states: Tensor, prompt: Tensor, num_prefix: int) -> Tensor:
        num_patches = hidden_states.shape[1] - num_prefix
        repeats, rest = divmod(num_patches, len(prompt))
        if not repeats:
            # The published code would add nothing, so that the prompts get no gradient.
            raise ValueError(
                f"prompt_length {len(prompt)} with prompt_pos='add': expected at most "
                f"{num_patches}, one for each patch token"
            )
        added = prompt.repeat(repeats, 1)
        return hidden_states + nn.functional.pad(added, (0, 0, num_prefix, rest))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Without a flag, the prompts come from the published code and are initialised.
        flag = f"{prefix}prompt_initialised"
        if f"{prefix}prompt" in state_dict and flag not in state_dict:
            state_dict[flag] = torch.tensor(True)
        self._checked = False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _initial_value(spec: PromptSpec, width: int) -> Tensor:
    value = torch.zeros(len(spec.layers), spec.length, width)
    if spec.init == "uniform":
        nn.init.uniform_(value, -UNIFORM_BOUND, UNIFORM_BOUND)
    elif spec.init == "normal":
        nn.init.normal_(value, std=NORMAL_STD)
    elif spec.init == "kaiming":
        # He et al. 2015 (arXiv:1502.01852) with fan_in L * D, as torch computes it for 3-D tensors.
        nn.init.normal_(value, std=(2 / (spec.length * width)) ** 0.5)
    if spec.noise_std:
        value += torch.randn_like(value) * spec.noise_std
    return value


def _mean_over_ranks(tokens: Tensor) -> Tensor:
    # Sums and counts are reduced, not means, because batches of the ranks may differ in size.
    total = tokens.float().sum(dim=(0, 1))
    count = total.new_tensor([tokens.shape[0] * tokens.shape[1]])
    if distributed.is_available() and distributed.is_initialized():
        both = torch.cat([total, count])
        distributed.all_reduce(both)
        total, count = both[:-1], both[-1:]
    return total / count
