"""Verifies a merged model by loading it and comparing what it computes.

A folder with exactly the written bytes can still be wrong: transformers initialises a missing
output layer at random and only logs a warning. The folder is therefore loaded on the meta device,
which checks names and shapes, and a few tokens are run through the first layers and the head of
both PEFT's model (base plus adapters) and the result.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import no_init_weights

from pallava.release.adapters import Adapter
from pallava.release.base_model import BaseModel, check_report, load_on_meta
from pallava.release.weights import WeightFolder
from pathcore.weights import CheckpointError

_NUM_LAYERS = 2
_NUM_TOKENS = 32
_NUM_POSITIONS = 8  # per sequence
_MAX_PROBE_BYTES = 1 << 30
"""Memory above which one layer is probed instead of two; a layer of an 8B model takes 0.9 GB."""

_PREFIX = "base_model.model."
_logger = logging.getLogger(__name__)


def verify_model(
    base: BaseModel,
    adapters: Sequence[Adapter],
    folder: Path,
    *,
    tied: bool,
    probe: bool = True,
    model_class: Any = None,
    prefix: str = "",
) -> None:
    """Loads a merged model and compares what it computes with PEFT.

    Args:
        base: Base model.
        adapters: Adapters that were merged.
        folder: Folder of the result.
        tied: Whether the output layer must share the input embeddings.
        probe: Whether to compare the logits of a few tokens.
        model_class: Class of the result; by default that of the causal language model.
        prefix: Prefix of the language model's tensors in `folder`.

    Raises:
        CheckpointError: If tensors are missing, unexpected, misshapen or wrongly tied, or if the
            logits differ by more than the rounding of the weights explains.
    """
    if base.model is None:
        _logger.warning(
            "%s: transformers does not know this architecture; the result was not loaded to check "
            "it",
            base.folder,
        )
        return
    result = WeightFolder(folder)
    model, report = load_on_meta(result, model_class)
    check_report(report, folder)
    unexpected = sorted(set(report["unexpected_keys"]) - base.unexpected_names)
    if unexpected:
        raise CheckpointError(
            f"{folder}: transformers has no place for {', '.join(unexpected[:10])}; is this base "
            "model supported by its class?"
        )
    output = model.get_output_embeddings()
    if output is not None and (output.weight is model.get_input_embeddings().weight) != tied:
        raise CheckpointError(
            f"{folder}: the output layer must {'' if tied else 'not '}be the input embeddings, but "
            f"{type(model).__name__} loads it otherwise"
        )
    if probe:
        _compare(base, adapters, result, tied, prefix)


@dataclass
class _Probe:
    """A language model reduced to its first layers and a few tokens of its vocabulary.

    Args:
        base: The full model.
        num_layers: Number of layers to keep.
        tokens: Token ids to keep; all of them if a norm over the vocabulary matters.
    """

    base: BaseModel
    num_layers: int
    tokens: Tensor

    def __post_init__(self) -> None:
        model = self.base.model
        self.layers = next(
            f"{name}."
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
        )
        bias = str(self.base.output_embeddings).removesuffix("weight") + "bias"
        self.by_token = {self.base.input_embeddings, self.base.output_embeddings, bias}

    def build(self, read: Callable[[str], Tensor | None], *, tied: bool) -> nn.Module:
        """Builds the model in fp32 from the tensors that `read` returns."""
        config = copy.deepcopy(self.base.model.config)
        config.num_hidden_layers = self.num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: self.num_layers]
        config.vocab_size = len(self.tokens)
        config.pad_token_id = None  # would lie outside the reduced vocabulary
        config.tie_word_embeddings = tied
        major, minor = map(int, transformers.__version__.split(".")[:2])
        keyword = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"  # renamed there
        # Only buffers get memory: every parameter is assigned below.
        with no_init_weights(), init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation="eager",
                trust_remote_code=False,
                **{keyword: torch.float32},
            )
        tensors = {}
        for name in model.state_dict():
            tensor = read(name)
            if tensor is not None:
                tensors[name] = tensor.float()
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        aliases = {self.base.output_embeddings} if tied else set()
        unfilled = {name for name, _ in model.named_parameters()} - set(tensors) - aliases
        if unfilled:
            raise CheckpointError(f"no tensors for {sorted(unfilled)[:10]} of the probe")
        return model.eval()

    def holds(self, name: str) -> bool:
        """Returns whether a tensor of the full model is part of the probe."""
        if not name.startswith(self.layers):
            return True
        return int(name.removeprefix(self.layers).split(".")[0]) < self.num_layers

    def rows(self, weights: BaseModel | WeightFolder, name: str, stored: str) -> Tensor:
        """Reads a tensor, or only the rows of kept tokens."""
        if name not in self.by_token:
            return weights.read(stored)
        return torch.cat([weights.read(stored, i, i + 1) for i in self.tokens.tolist()])

    def adapter_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        """Reads an adapter's tensors under PEFT's names."""
        tensors = {}
        for stored in adapter.weights:
            name = stored.removeprefix(_PREFIX)
            if not self.holds(name) or adapter.is_copy(stored):
                continue
            plain = name.replace(".base_layer.", ".")
            module, _, part = name.partition(".lora_")
            if not part:
                tensor = self.rows(adapter.weights, plain, stored)
            else:
                tensor = adapter.weights.read(stored)
                if f"{module}.weight" == self.base.input_embeddings and part.startswith(
                    "embedding_A"
                ):
                    tensor = tensor[:, self.tokens]
                elif f"{module}.weight" == self.base.output_embeddings and not part.startswith("A"):
                    tensor = tensor[self.tokens]
            tensors[_PREFIX + name] = tensor.float()
        return tensors

    def logits(self, model: nn.Module) -> Tensor:
        """Runs the kept tokens through a model; returns `(tokens, vocab_size)`."""
        ids = torch.arange(min(len(self.tokens), _NUM_TOKENS))
        ids = ids[None] if len(ids) % _NUM_POSITIONS else ids.view(-1, _NUM_POSITIONS)
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.flatten(0, 1).double()


def _compare(
    base: BaseModel, adapters: Sequence[Adapter], result: WeightFolder, tied: bool, prefix: str
) -> None:
    if base.model.config.get_text_config() is not base.model.config:
        _logger.warning("%s: holds more than a language model; logits not compared", base.folder)
        return
    probe = _probe_of(base, adapters)
    trained = probe.build(
        lambda name: probe.rows(base, name, name) if name in base else None, tied=base.is_tied
    )
    expected = probe.logits(_with_adapters(trained, adapters, probe))
    del trained
    gc.collect()  # PEFT's wrappers form reference cycles

    def read(name: str) -> Tensor | None:
        return probe.rows(result, name, prefix + name) if prefix + name in result else None

    found = probe.logits(probe.build(read, tied=tied))
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    errors = (found - expected).square().mean(-1).sqrt() / spread.clamp(min=1e-12)
    # Rounding may route a token to another expert, which is not an error of the merge.
    config = base.model.config
    is_mixture = getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0)
    error = float(errors.median() if is_mixture else errors.max())
    widest = max(torch.finfo(result.info(n).dtype).eps for n in _floats(result, prefix))
    tolerance = 1e-4 + (4 * widest if widest > 1e-6 else 0)
    if not error <= tolerance:
        names = ", ".join(str(adapter.folder) for adapter in adapters) or "no adapter"
        raise CheckpointError(
            f"{result.folder}: the logits differ from those of {base.folder} with {names} by "
            f"{error:.2g} of their spread, {tolerance:.2g} allowed. Please report this with "
            "adapter_config.json"
        )
    _logger.info("logits agree with PEFT's to %.1g of their spread", error)


def _probe_of(base: BaseModel, adapters: Sequence[Adapter]) -> _Probe:
    config = base.model.config
    embeddings = {base.input_embeddings, base.output_embeddings}
    sizes = [base.info(str(base.input_embeddings)).shape[0]]
    for adapter in adapters:  # whose vocabulary may be smaller
        replaced = [stored for n, stored in adapter.replacements.items() if n in embeddings]
        sizes += [adapter.weights.info(stored).shape[0] for stored in replaced]
    vocabulary = min(sizes)
    step = max(1, vocabulary // _NUM_TOKENS)
    tokens = torch.arange(0, vocabulary, step)[:_NUM_TOKENS]
    if any(a.config.get("use_dora") and embeddings & set(a.parts) for a in adapters):
        tokens = torch.arange(vocabulary)  # DoRA normalises over the whole vocabulary
    probe = _Probe(base, min(_NUM_LAYERS, config.num_hidden_layers), tokens)
    numel = sum(
        tensor.numel() * len(tokens) // vocabulary if name in probe.by_token else tensor.numel()
        for name, tensor in base.model.state_dict().items()
        if probe.holds(name)
    )
    if 4 * numel > _MAX_PROBE_BYTES:
        probe.num_layers = 1
    return probe


def _with_adapters(model: nn.Module, adapters: Sequence[Adapter], probe: _Probe) -> nn.Module:
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict  # takes seconds to import

    names = []
    peft_model: Any = None
    for index, adapter in enumerate(adapters):
        tensors = probe.adapter_tensors(adapter)
        if not tensors:
            continue  # changes only layers outside the probe
        config = LoraConfig.from_pretrained(str(adapter.folder))
        config.init_lora_weights = True  # overwritten below
        names.append(f"adapter_{index}")
        if peft_model is None:
            peft_model = PeftModel(model, config, adapter_name=names[-1])
        else:
            peft_model.add_adapter(names[-1], config)
        report = set_peft_model_state_dict(peft_model, tensors, adapter_name=names[-1])
        if report.unexpected_keys:
            raise CheckpointError(
                f"{adapter.folder}: PEFT has no place for {', '.join(report.unexpected_keys[:10])}"
            )
    if peft_model is None:
        return model
    if len(names) > 1:  # PEFT cannot activate several adapters at once if one uses DoRA
        return peft_model.merge_and_unload(adapter_names=names).eval()
    return peft_model.eval()


def _floats(weights: WeightFolder, prefix: str) -> list[str]:
    return [
        name
        for name in weights
        if name.startswith(prefix) and weights.info(name).dtype.is_floating_point
    ]
