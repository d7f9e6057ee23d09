"""Estimates the memory of a training on GPUs before it runs, without weights and without a GPU.

The model of a config is built on the meta device, where tensors have shapes but no data. One
training step runs there, forward and backward, while the bytes of all live tensors are counted.
Weights, gradients and optimizer state follow from the parameters.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig
from xtuner.registry import BUILDER

from pallava.engine.conversations import DEFAULT_MAX_LENGTH
from pallava.engine.runtime import _type_name, prepare_host
from pallava.inference.loading import check_model_name
from pallava.modeling.folders import read_vision_config
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.text.encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from pathcore.config_file import read_config
from pathcore.files import StrPath
from pathcore.names import WrongArgumentError

ZeroStage = Literal[0, 2, 3]

_META = torch.device("meta")
_BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit formats."""
_SCALES = 256
"""Scales that share one scale of their own with double quantisation."""
_BUCKET = 500_000_000
"""Elements of each of the two buffers in which DeepSpeed reduces gradients (its default)."""
_GATHERED = 1_000_000_000
"""Most parameters that ZeRO-3 holds gathered (DeepSpeed's `stage3_max_live_parameters`)."""
_ADAMW_TENSORS = 2


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model.

    Attributes:
        name: Name of the part, such as `llm`.
        parameters: Number of parameters.
        trained: Number of trained parameters.
        held_bytes: Bytes of the weights as they are loaded.
        dtypes: Number of parameters by type, such as `{"bfloat16": 8_000_000_000}`.
    """

    name: str
    parameters: int
    trained: int
    held_bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """Size of a batch on one GPU.

    Attributes:
        samples: Number of samples.
        sub_images: Number of sub-images per image.
        text_tokens: Number of text tokens per sample, all of which are learned.
        images: Number of images per sample.
    """

    samples: int
    sub_images: int
    text_tokens: int
    images: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU at the peak of a training step.

    Attributes:
        weights: Weights, frozen and trained.
        gradients: Gradients, which accumulation keeps between iterations.
        optimizer: AdamW's moments, and the fp32 copies that DeepSpeed keeps.
        buffers: Communication buffers.
        activations: Everything else that is allocated at the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


class TrainingPlan:
    """Memory of the training that a config describes.

    Args:
        config_file: Config of `pallava.model.LLaVAModel`.
        llm: Folder with the language model's `config.json`, or its name on the hub, instead of the
            config's. Weights are not read.
        visual_encoder: Vision encoder instead of the config's.
        options: Settings that override the config's, as `--cfg-options`.

    Raises:
        FileNotFoundError: If the language model's config cannot be found.
        WrongArgumentError: If the config cannot be read, or is for another kind of model.

    Attributes:
        model: The model, on the meta device.
        notes: Assumptions that were made.
        batch_size: Samples per GPU and iteration of the config.
        max_length: Longest text of the config, in tokens.
        max_sub_images: Most sub-images of an image; 0 if the model reads only thumbnails.
        compute_dtype: Type of mixed precision; None without.
    """

    def __init__(
        self,
        config_file: StrPath,
        *,
        llm: str | None = None,
        visual_encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        prepare_host()
        cfg = read_config(Config.fromfile, config_file, options)
        model = cfg.get("model") or {}
        dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
        if "llm" not in model or "visual_encoder" not in model or "features_folder" in dataset:
            raise WrongArgumentError(
                f"{config_file}: expected a config of a model of images with model.llm and "
                "model.visual_encoder, such as pallava_domain_alignment"
            )
        self.notes: list[str] = []
        self.llm_name = llm or str(model["llm"]["pretrained_model_name_or_path"])
        self._quantised = _quantisation(model["llm"])
        self.model = self._build(model, visual_encoder or model["visual_encoder"])
        self.batch_size = int((cfg.get("train_dataloader") or {}).get("batch_size", 1))
        self.max_length = int(dataset.get("max_length") or DEFAULT_MAX_LENGTH)
        uses_sub_images = self.model.projector.uses_sub_images and dataset.get("anyres_image", True)
        self.max_sub_images = 8 if uses_sub_images else 0
        wrapper = cfg.get("optim_wrapper") or {}
        mixed = _type_name(wrapper.get("type")).endswith("AmpOptimWrapper")
        self.compute_dtype = (
            getattr(torch, str(wrapper.get("dtype") or "float16").removeprefix("torch."))
            if mixed
            else None
        )

    def parts(self) -> list[PartSize]:
        """Returns the sizes of language model, vision encoder and connector."""
        sizes = []
        for name, part in self.model.named_children():
            dtypes: dict[str, int] = {}
            for parameter, kind, _ in self._parameters(part):
                dtypes[kind] = dtypes.get(kind, 0) + parameter.numel()
            numbers = [(p.numel(), p.requires_grad) for p in part.parameters()]
            sizes.append(
                PartSize(
                    name,
                    sum(number for number, _ in numbers),
                    sum(number for number, trained in numbers if trained),
                    sum(size for _, _, size in self._parameters(part)),
                    dtypes,
                )
            )
        return sizes

    def estimate(
        self, batch: Batch, *, gpus: int = 1, zero: ZeroStage = 0, checkpointing: bool = True
    ) -> MemoryPlan:
        """Estimates the memory of one GPU.

        Args:
            batch: Size of the batch on each GPU.
            gpus: Number of GPUs over which DeepSpeed partitions; without it, each holds everything.
            zero: DeepSpeed's stage, or 0 for plain data parallelism.
            checkpointing: Whether activations are recomputed in the backward pass.

        Raises:
            ValueError: If the settings cannot be combined.
        """
        if zero == 3 and self._quantised:
            raise ValueError("ZeRO-3 cannot partition the weights of bitsandbytes; use --zero 2")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trained)
        activations = self.activations(batch, checkpointing=checkpointing, deepspeed=zero > 0)
        if zero == 0:
            held = sum(size for _, _, size in self._parameters(self.model))
            own = sum(p.numel() * p.element_size() for p in trained)
            # DDP reduces gradients in buckets, which are a second copy of them.
            return MemoryPlan(held, own, _ADAMW_TENSORS * own, own if gpus > 1 else 0, activations)
        half = 2
        weights = sum(
            size if kind in _QUANTISED else parameter.numel() * half
            for parameter, kind, size in self._parameters(self.model)
        )
        buffers = 2 * _BUCKET * half
        if zero == 3:
            buffers += min(weights, _GATHERED * half)
            weights //= gpus
        return MemoryPlan(
            weights,
            count * half // gpus,
            count * 4 * (1 + _ADAMW_TENSORS) // gpus,
            buffers,
            activations,
        )

    def activations(
        self, batch: Batch, *, checkpointing: bool = True, deepspeed: bool = False
    ) -> int:
        """Returns the bytes at the peak of a step without weights, gradients and optimizer state.

        Args:
            batch: Size of the batch.
            checkpointing: Whether activations are recomputed in the backward pass.
            deepspeed: Whether DeepSpeed trains, which casts the whole model to 16 bits.
        """
        dtype = self.compute_dtype or (torch.bfloat16 if deepspeed else None)
        copies = 0
        if self.compute_dtype is not None and not deepspeed:
            # Autocast keeps a cast copy of every fp32 weight that is trained.
            full = [p for p in self.model.parameters() if p.requires_grad and p.element_size() == 4]
            copies = sum(p.numel() for p in full) * self.compute_dtype.itemsize
        original = {name: p.dtype for name, p in self.model.named_parameters()}
        if dtype is not None:
            self.model.to(dtype)
        try:
            peak = step_bytes(self.model, batch, checkpointing=checkpointing)
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.grad = None
                parameter.data = parameter.data.to(original[name])
        # The matrix products of bitsandbytes write out one weight at a time in 16 bits.
        quantised = [p.numel() for p, kind, _ in self._parameters(self.model) if kind in _QUANTISED]
        return peak + copies + max(quantised, default=0) * 2

    def _parameters(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, str, int]]:
        """Yields every parameter with its type and bytes, including those of quantised layers."""
        small = set()
        if self._quantised and (module is self.model or module is self.model.llm):
            head = self.model.llm.get_output_embeddings()
            small = {
                id(layer.weight)
                for name, layer in self.model.llm.named_modules()
                if isinstance(layer, nn.Linear) and layer is not head and ".lora_" not in name
            }
        for parameter in module.parameters():
            if id(parameter) in small:
                kind, size = self._quantised
                yield parameter, kind, size(parameter)
            else:
                size_bytes = parameter.numel() * parameter.element_size()
                yield parameter, str(parameter.dtype).removeprefix("torch."), size_bytes

    def _build(self, model: Any, visual_encoder: Any) -> Any:
        encoder = self._build_encoder(visual_encoder)
        language_model = _empty_llm(self.llm_name, model["llm"])
        arguments = {**model, "llm": language_model, "visual_encoder": encoder}
        arguments.pop("max_position_embeddings", None)
        pretrained = model.get("pretrained_pth")
        if pretrained and not Path(str(pretrained)).exists():
            arguments["pretrained_pth"] = None
            self.notes.append(f"{pretrained} does not exist yet: assumed scale-invariant mode")
        with _META, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            return BUILDER.build(arguments).to(_META).train()

    def _build_encoder(self, value: Any) -> nn.Module:
        from pallava.model import build_encoder

        if not isinstance(value, str) or ":" in value:
            return build_encoder(value).to(_META)
        if Path(value).exists():
            config = read_vision_config(value)
        else:
            config = CLIPVisionConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                image_size=224,
                patch_size=16,
            )
            self.notes.append(f"{value} does not exist: assumed PLIP's ViT-B/16 of 224 px")
        with _META:
            return PLIPVisionEncoder(config)


def step_bytes(model: Any, batch: Batch, *, checkpointing: bool = True) -> int:
    """Runs a training step on the meta device; returns the peak of bytes of what it allocates.

    Gradients are assumed to exist already, as after an accumulated step, and are not counted.
    Attention is assumed to use a fused kernel, unless the model implements it itself.

    Args:
        model: `LLaVAModel` on the meta device.
        batch: Size of the batch.
        checkpointing: Whether activations are recomputed in the backward pass.
    """
    (model.activation_checkpointing_enable if checkpointing
     else model.activation_checkpointing_disable)()  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    size = model.visual_encoder.config.image_size
    images = batch.samples * batch.images
    ids = torch.ones(batch.samples, batch.images + batch.text_tokens, dtype=torch.long)
    ids[:, : batch.images] = IMAGE_TOKEN_INDEX
    labels = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX)
    gc.collect()
    with _LiveBytes(model) as live, _runs_on_meta():
        tiles = [
            torch.empty(1 + batch.sub_images, 3, size, size, device=_META) for _ in range(images)
        ]
        inputs = model.prepare_inputs(ids, tiles, labels=labels)
        length = inputs.inputs_embeds.shape[1]
        eager = model.llm.config._attn_implementation == "eager"
        mask = torch.empty(
            (batch.samples, 1, length, length),
            dtype=inputs.inputs_embeds.dtype if eager else torch.bool,
            device=_META,
        )
        positions = inputs.position_ids.to(_META)
        inputs = replace(inputs, attention_mask=mask, position_ids=positions)
        model.language_model_loss(inputs).backward()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the meta tensors that are alive, without those of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = self._now = 0
        known = [*model.parameters(), *model.buffers()]
        known += [p.grad for p in model.parameters() if p.grad is not None]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts the storages that it allocates."""
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.device != _META:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


@contextmanager
def _runs_on_meta() -> Iterator[None]:
    """Replaces two functions that fail or allocate too much on the meta device.

    `torch.autocast`, which rotary embeddings switch off, does not support it; and scaled dot
    product attention would take the path that stores all attention weights.
    """
    with (
        patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused_attention),
    ):
        yield


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    del dropout_p
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _empty_llm(name: str, settings: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        check_model_name(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileNotFoundError(
            f"language model {name!r}: its config.json cannot be read ({reason}); --llm FOLDER "
            "names a folder that holds it, weights are not needed"
        ) from error
    dtype = settings.get("torch_dtype", settings.get("dtype"))
    if dtype is None or dtype == "auto":
        dtype = config.dtype if dtype == "auto" and config.dtype is not None else torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    chosen = {k: settings[k] for k in ("attn_implementation",) if k in settings}
    with _META:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)


_QUANTISED = ("4 bits", "8 bits")


def _quantisation(settings: Mapping[str, Any]) -> Any:
    """Returns type and size function of the quantised weights of a language model's settings."""
    value = settings.get("quantization_config")
    if value is None:
        return None
    config = BUILDER.build(dict(value)) if isinstance(value, Mapping) else value
    if getattr(config, "load_in_4bit", False):
        double = bool(config.bnb_4bit_use_double_quant)
        return _QUANTISED[0], partial(four_bit_bytes, double_quantised=double)
    if getattr(config, "load_in_8bit", False):
        return _QUANTISED[1], lambda weight: weight.numel() + 4 * weight.shape[0]
    raise ValueError(
        f"model.llm.quantization_config: expected bitsandbytes in 4 or 8 bits, found {config}"
    )


def four_bit_bytes(weight: Tensor, *, double_quantised: bool) -> int:
    """Returns the bytes of a weight in bitsandbytes' 4-bit formats, its scales included.

    Every 64 weights share an fp32 scale; with double quantisation the scales take a byte each, and
    256 of them share an fp32 scale.
    """
    scales = -(-weight.numel() // _BLOCK)
    size = -(-weight.numel() // 2)
    return size + (scales + 4 * -(-scales // _SCALES) if double_quantised else 4 * scales)
