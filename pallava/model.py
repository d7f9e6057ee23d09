"""PA-LLaVA as an XTuner model. Published configs import `pallava.model`, so the path is public."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from xtuner.registry import BUILDER

from pallava.engine.optim import PARTS, tag_parameters
from pallava.engine.runtime import prepare_host
from pallava.feature_cache import CachedImage, check_encoder, visual_tokens
from pallava.inference.loading import check_model_name
from pallava.modeling.folders import connector_config_of, load_vision_encoder
from pallava.modeling.llava import BagEncoder, MultimodalMixin, SubImageMask, use_softcap
from pallava.modeling.qformer import ConnectorConfig, connector_state_dict
from pallava.registry import CONNECTORS, ENCODERS
from pallava.release.zero import load_checkpoint
from pathcore.files import StrPath
from pathcore.weights import CheckpointError, check_names


class LLaVAModel(MultimodalMixin, BaseModel):
    """Vision encoder, connector and language model for `xtuner train`.

    The state dict holds trained parts only: LoRA and the connector in both published stages.

    Args:
        llm: Config or module of a causal language model.
        visual_encoder: Folder of a PLIP or CLIP encoder, `name:folder` for a registered encoder, a
            config, or a module with `features` and `config`; for whole slides, a module such as
            `pallava.modeling.slide_tokens.SlideTokenEncoder`.
        freeze_llm: Whether to freeze the base language model.
        freeze_visual_encoder: Whether to freeze the encoder.
        visual_select_layer: Index of the encoder's hidden state that the connector reads.
        pretrained_pth: Checkpoint of an earlier stage, in any published format. The keys of its
            connector decide between released and scale-invariant mode.
        projector_type: Registered name of the connector.
        projector_depth: Number of linear layers in the connector's final projection.
        cross_attention: True for scale-invariant mode, False for released mode. Defaults to the
            mode of `pretrained_pth`, or scale-invariant without one.
        cross_attention_freq: Interval between connector layers that attend to sub-images.
        num_hidden_layers: Number of connector layers.
        connector: Further fields of `ConnectorConfig`.
        sub_image_mask: See `pallava.modeling.llava.MultimodalMixin`.
        llm_lora: LoRA config for the language model; `target_modules=None` selects all linear
            layers except the output layer.
        use_activation_checkpointing: Whether to recompute activations in the backward pass.
        max_position_embeddings: Context length to which the rotary position embeddings are
            linearly scaled; for models without their own scaling.

    Raises:
        FileNotFoundError: If a folder or checkpoint does not exist.
        CheckpointError: If a checkpoint does not fit, or was trained in a mode other than
            `cross_attention` asks for.
    """

    def __init__(
        self,
        llm: Any,
        visual_encoder: Any,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        visual_select_layer: int = -2,
        pretrained_pth: StrPath | None = None,
        projector_type: str = "qformer_mlp",
        projector_depth: int = 1,
        cross_attention: bool | None = None,
        cross_attention_freq: int = 1,
        num_hidden_layers: int = 6,
        connector: Mapping[str, Any] | None = None,
        sub_image_mask: SubImageMask = "exact",
        llm_lora: Any = None,
        use_activation_checkpointing: bool = True,
        max_position_embeddings: int | None = None,
    ) -> None:
        _warn_of_plain_xtuner()
        prepare_host()  # with published configs, this is the first of our code to run
        super().__init__()
        self.freeze_llm = freeze_llm
        self.freeze_visual_encoder = freeze_visual_encoder
        self.use_llm_lora = llm_lora is not None
        self.visual_select_layer = visual_select_layer
        self.sub_image_mask = sub_image_mask
        self._checked_caches: set[str] = set()
        pretrained = load_checkpoint(pretrained_pth) if pretrained_pth else None
        self.visual_encoder = build_encoder(visual_encoder)
        self.llm = _build_llm(llm, max_position_embeddings)
        use_softcap(self.llm)
        # Chat models ship settings that sample and penalise repetition, and transformers would mix
        # them into those of the chat hook.
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {name: getattr(self.llm.generation_config, name) for name in names}
        self.llm.generation_config = GenerationConfig(**tokens)
        width = self.visual_encoder.config.hidden_size
        config = ConnectorConfig(
            **{
                "visual_hidden_size": width,
                # Not `hidden_size`: the embeddings of some OPT models are narrower.
                "llm_hidden_size": self.llm.get_input_embeddings().embedding_dim,
                "num_attention_heads": self.visual_encoder.config.num_attention_heads,
                "num_hidden_layers": num_hidden_layers,
                "cross_attention_freq": cross_attention_freq,
                "depth": projector_depth,
                **_from_checkpoint(cross_attention, width, pretrained, pretrained_pth),
                **(connector or {}),
            }
        )
        self.projector = CONNECTORS.get(projector_type)(config)
        self._freeze()
        if self.use_llm_lora:
            self.llm = _add_lora(self.llm, llm_lora)
        if use_activation_checkpointing:
            self.activation_checkpointing_enable()
        self.llm.config.use_cache = False
        tag_parameters(self, PARTS)
        if pretrained is not None:
            self._load_pretrained(pretrained, str(pretrained_pth))
        self.register_load_state_dict_pre_hook(refuse_other_weights)

    def init_weights(self) -> None:
        """Does nothing: the constructor already initialised or loaded all weights."""

    def activation_checkpointing_enable(self) -> None:
        """Enables activation checkpointing, non-re-entrant because DDP requires it."""
        self.llm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        for part in (self.visual_encoder, self.projector):
            if hasattr(part, "gradient_checkpointing_enable"):
                part.gradient_checkpointing_enable()

    def activation_checkpointing_disable(self) -> None:
        """Disables activation checkpointing, as generation requires."""
        for part in (self.llm, self.visual_encoder, self.projector):
            if hasattr(part, "gradient_checkpointing_disable"):
                part.gradient_checkpointing_disable()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the trained tensors in their published names, and the connector's one buffer."""
        prefix = kwargs.get("prefix", "")
        trained = {
            prefix + name for name, tensor in self.named_parameters() if tensor.requires_grad
        }
        prefixes = (f"{prefix}projector.",)
        if not self.freeze_visual_encoder:
            prefixes += (f"{prefix}visual_encoder.",)
        return OrderedDict(
            (name, tensor)
            for name, tensor in super().state_dict(*args, **kwargs).items()
            if name in trained or name.startswith(prefixes)
        )

    def forward(
        self, data: dict[str, Any], data_samples: Any = None, mode: str = "loss"
    ) -> dict[str, Tensor] | Any:
        """Runs one batch.

        Args:
            data: Batch from `default_collate_fn`: `input_ids`, `attention_mask`, `labels` and, if
                there are any, `pixel_values` and `label_marks`.
            data_samples: Unused; MMEngine passes it.
            mode: `loss` returns `{"loss": ...}`, `tensor` the language model's output, `predict` a
                list of logits.

        Raises:
            ValueError: If `mode` is none of these.
        """
        del data_samples
        inputs = self.prepare_inputs(
            data["input_ids"],
            data.get("pixel_values"),
            data.get("attention_mask"),
            data.get("labels"),
            label_marks=data.get("label_marks"),
        )
        if mode == "loss":
            return {"loss": self.language_model_loss(inputs)}
        if mode not in ("tensor", "predict"):
            raise ValueError(f"mode: expected 'loss', 'tensor' or 'predict', found {mode!r}")
        outputs = self.llm(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
        )
        return outputs if mode == "tensor" else [{"logits": logits} for logits in outputs.logits]

    def to_hf(
        self,
        cfg: Any,
        save_dir: str,
        fp32: bool = False,
        save_pretrained_kwargs: Mapping[str, Any] | None = None,
        save_format: str = "xtuner",
        **kwargs: Any,
    ) -> None:
        """Writes the trained parts, as called by `xtuner convert pth_to_hf`.

        Args:
            cfg: Training config, from which tokenizer and image processor are built.
            save_dir: Output folder for `llm_adapter/`, `projector/` and, if they were trained, the
                encoder and the language model.
            fp32: Whether to keep the language model in fp32 instead of half precision.
            save_pretrained_kwargs: Keyword arguments for Hugging Face's `save_pretrained`.
            save_format: Must be `xtuner`; the stock LLaVA formats cannot represent this connector.
            kwargs: Unused.

        Raises:
            ValueError: If `save_format` is not `xtuner`.
        """
        from pallava.engine.export import save_trained_parts

        del kwargs
        if save_format != "xtuner":
            raise ValueError(
                f"--save-format {save_format}: stock LLaVA checkpoints hold an MLP projector and "
                "have no place for the scale-invariant connector; use --save-format xtuner"
            )
        save_trained_parts(self, cfg, Path(save_dir), fp32, dict(save_pretrained_kwargs or {}))

    def _visual_tokens(self, pixel_values: Sequence[Any]) -> tuple[Tensor, Tensor, list[int]]:
        if not isinstance(pixel_values[0], CachedImage):
            return super()._visual_tokens(pixel_values)
        folder = str(Path(pixel_values[0].file).parents[1])
        if folder not in self._checked_caches:
            check_encoder(self, folder)
            self._checked_caches.add(folder)
        return visual_tokens(self, pixel_values)

    def _freeze(self) -> None:
        if self.freeze_llm or self.use_llm_lora:
            self.llm.requires_grad_(False)
        if self.freeze_visual_encoder:
            self.visual_encoder.requires_grad_(False)

    def _load_pretrained(self, pretrained: Mapping[str, Tensor], source: str) -> None:
        expected = self.state_dict()
        encoder = "visual_encoder."
        is_of_images = not any(name.startswith(encoder) for name in pretrained)
        if is_of_images and isinstance(self.visual_encoder, BagEncoder):
            # A checkpoint trained on images may initialise LoRA and connector of a slide model, but
            # has no weights for the slide encoder.
            expected = {n: t for n, t in expected.items() if not n.startswith(encoder)}
        check_names(expected, pretrained, what="trained part of the model", source=source)
        self.load_state_dict(dict(pretrained), strict=False)
        print_log(f"Loaded {len(expected)} tensors from {source}", "current")


def refuse_other_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_arguments: Any
) -> None:
    """Stops a model from loading a checkpoint that does not fit, as a hook of its loading.

    MMEngine (`--resume`, `load_from`), DeepSpeed and XTuner's converter load what fits and leave
    the rest at its random start.

    Raises:
        CheckpointError: If tensors are missing, unexpected or of another shape.
    """
    expected = model.state_dict(prefix=prefix)
    if any(hasattr(parameter, "ds_numel") for parameter in model.parameters()):
        # ZeRO-3 leaves no values, and so no shapes, in the state dict.
        expected = {name: state_dict.get(name, tensor) for name, tensor in expected.items()}
    found = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    check_names(expected, found, what="trained part of the model", source="the checkpoint")


def _warn_of_plain_xtuner() -> None:
    """Warns that plain `xtuner train` fails on a CPU, where MMEngine raises a bare assertion."""
    plain = Path(sys.argv[0]).parts[-3:] == ("xtuner", "tools", "train.py")
    if plain and not torch.cuda.is_available():
        print_log(
            "no GPU: plain `xtuner train` stops at AmpOptimWrapper on a CPU; `xtuner-add train` "
            "with the same arguments trains in fp32",
            "current",
            logging.WARNING,
        )


def build_encoder(value: Any) -> nn.Module:
    """Builds the vision encoder from a folder, a registered name, a config or a module.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Mapping):
        return BUILDER.build(dict(value))
    name, separator, folder = str(value).partition(":")
    if separator and not Path(str(value)).exists():
        return ENCODERS.get(name)(folder)
    return load_vision_encoder(value)


def _build_llm(value: Any, max_position_embeddings: int | None) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    from huggingface_hub.errors import HFValidationError
    from xtuner.model.utils import traverse_dict

    name = value.get("pretrained_model_name_or_path")
    if name is not None:
        # Otherwise transformers prompts on the terminal whether to run the code named by a folder's
        # `auto_map`, and would read the answer from piped input.
        value.setdefault("trust_remote_code", False)
    try:
        if name is not None:
            check_model_name(name)
        if max_position_embeddings is not None:
            value["config"] = _stretched_config(name, max_position_embeddings)
        traverse_dict(value)
        return BUILDER.build(value)
    except (OSError, HFValidationError) as error:  # HFValidationError for absolute paths
        raise FileNotFoundError(f"language model {name!r} cannot be loaded: {error}") from error


def _stretched_config(name: str, max_position_embeddings: int) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if max_position_embeddings > config.max_position_embeddings:
        factor = -(-max_position_embeddings // config.max_position_embeddings)
        own = getattr(config, "rope_scaling", None)
        if own:
            raise ValueError(
                f"max_position_embeddings={max_position_embeddings}: {name} comes with the scaling "
                f"{own.get('rope_type') or own.get('type')!r} up to "
                f"{config.max_position_embeddings} positions, which linear scaling would replace; "
                "omit max_position_embeddings"
            )
        config.rope_scaling = {"rope_type": "linear", "factor": float(factor)}
    return config


def _add_lora(llm: nn.Module, lora: Any) -> nn.Module:
    from peft import get_peft_model

    config = BUILDER.build(lora) if isinstance(lora, Mapping) else lora
    if config.target_modules is None:
        output = llm.get_output_embeddings()
        config.target_modules = sorted(
            {
                name.rpartition(".")[2]
                for name, module in llm.named_modules()
                if isinstance(module, (nn.Linear, Conv1D)) and module is not output
            }
        )
    # XTuner's own helper first casts a half-precision base to fp32, which doubles memory without
    # any benefit to the frozen weights.
    return get_peft_model(llm, config)


def _from_checkpoint(
    asked: bool | None, width: int, pretrained: Mapping[str, Tensor] | None, source: object
) -> dict[str, Any]:
    """Takes mode and feed-forward width from an earlier stage's connector if there is one."""
    tensors = connector_state_dict(pretrained or {})
    if not tensors:
        return {"cross_attention": asked is not False, "intermediate_size": 4 * width}
    found = connector_config_of(tensors)
    if asked is not None and asked != found.cross_attention:
        raise CheckpointError(
            f"{source} holds a connector {'with' if found.cross_attention else 'without'} "
            f"cross-attention, the config says cross_attention={asked}; leave cross_attention out "
            "to follow the checkpoint"
        )
    return {
        "cross_attention": found.cross_attention,
        "intermediate_size": found.intermediate_size,
    }
