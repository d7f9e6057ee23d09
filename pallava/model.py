"""PA-LLaVA as XTuner trains it. The import path is public: published configs name it."""

from __future__ import annotations

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pallava.engine.optim import PARTS, tag_parameters
from pallava.engine.runtime import prepare_host
from pallava.inference.loading import check_model_name
from pallava.modeling.folders import connector_config_of, load_vision_encoder
from pallava.modeling.llava import MultimodalMixin, SubImageMask
from pallava.modeling.qformer import ConnectorConfig, connector_state_dict
from pallava.registry import CONNECTORS, ENCODERS
from pathcore.weights import CheckpointError, check_names, read_state_dict


class LLaVAModel(MultimodalMixin, BaseModel):
    """Vision encoder, connector and language model for `xtuner train`.

    Only what is trained is in the state dict: LoRA and connector in both published stages.

    Args:
        llm: Config or module of a causal language model.
        visual_encoder: A PLIP or CLIP folder, `name:folder` for an encoder registered under that
            name, a config, or a module with `features` and `config`; or one for whole slides, as
            `pallava.modeling.slide_tokens.SlideTokenEncoder`.
        freeze_llm: Keep the base language model as it is.
        freeze_visual_encoder: Keep the encoder as it is.
        visual_select_layer: Hidden state of the encoder that is used.
        pretrained_pth: Checkpoint of an earlier stage, in any published form; its connector's keys
            decide between released and scale-invariant mode.
        projector_type: Registered name of the connector.
        projector_depth: Linear layers at the connector's end.
        cross_attention: True for scale-invariant mode, False for released mode. By default that of
            `pretrained_pth`, and without one scale-invariant.
        cross_attention_freq: Every how many connector layers sub-images are attended to.
        num_hidden_layers: Depth of the connector.
        connector: Further fields of `ConnectorConfig`.
        sub_image_mask: See `pallava.modeling.llava.MultimodalMixin`.
        llm_lora: LoRA config for the language model; `target_modules` None means all its linear
            layers but the output.
        use_activation_checkpointing: Recompute layers in the backward pass.
        max_position_embeddings: Stretch the rotary positions of the language model to this length.

    Raises:
        FileNotFoundError: A folder or checkpoint that is not there.
        CheckpointError: A checkpoint that does not fit, or of another mode than asked for.
    """

    def __init__(
        self,
        llm: Any,
        visual_encoder: Any,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        visual_select_layer: int = -2,
        pretrained_pth: str | os.PathLike[str] | None = None,
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
        prepare_host()  # published configs name nothing of ours that would run earlier
        super().__init__()
        self.freeze_llm = freeze_llm
        self.freeze_visual_encoder = freeze_visual_encoder
        self.use_llm_lora = llm_lora is not None
        self.visual_select_layer = visual_select_layer
        self.sub_image_mask = sub_image_mask
        pretrained = read_state_dict(pretrained_pth) if pretrained_pth else None
        self.visual_encoder = build_encoder(visual_encoder)
        self.llm = _build_llm(llm, max_position_embeddings)
        width = self.visual_encoder.config.hidden_size
        config = ConnectorConfig(
            **{
                "visual_hidden_size": width,
                # Not `hidden_size`: the embeddings of some OPT models are narrower.
                "llm_hidden_size": self.llm.get_input_embeddings().weight.shape[1],
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

    def init_weights(self) -> None:
        """Nothing: all weights are set when the model is built."""

    def activation_checkpointing_enable(self) -> None:
        """Recomputes layers in the backward pass; non-re-entrant, so that DDP works with it."""
        self.llm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        for part in (self.visual_encoder, self.projector):
            if hasattr(part, "gradient_checkpointing_enable"):
                part.gradient_checkpointing_enable()

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations, as generation needs."""
        for part in (self.llm, self.visual_encoder, self.projector):
            if hasattr(part, "gradient_checkpointing_disable"):
                part.gradient_checkpointing_disable()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The trained tensors alone, in the published names, and the connector's one buffer."""
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
            data: `input_ids`, `attention_mask`, `labels` and, if there are images, `pixel_values`,
                as `default_collate_fn` makes them.
            data_samples: Not used; MMEngine passes it.
            mode: `loss` gives `{"loss": ...}`, `tensor` the language model's output, `predict` a
                list of logits.

        Raises:
            ValueError: Another mode.
        """
        del data_samples
        inputs = self.prepare_inputs(
            data["input_ids"],
            data.get("pixel_values"),
            data.get("attention_mask"),
            data.get("labels"),
        )
        if mode == "loss":
            return {"loss": self.language_model_loss(inputs)}
        if mode not in ("tensor", "predict"):
            raise ValueError(f"mode: 'loss', 'tensor' or 'predict' expected, got {mode!r}")
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
        """Writes what was trained, for `xtuner convert pth_to_hf`.

        Args:
            cfg: The training config, for tokenizer and image processor.
            save_dir: Where `llm_adapter/`, `projector/` and, if trained, the encoder and the
                language model go.
            fp32: Keep the language model's fp32; otherwise half precision.
            save_pretrained_kwargs: For Hugging Face's `save_pretrained`.
            save_format: `xtuner`; the stock LLaVA formats have no place for this connector.
            kwargs: Not used.

        Raises:
            ValueError: Another format.
        """
        from pallava.engine.export import save_trained_parts

        del kwargs
        if save_format != "xtuner":
            raise ValueError(
                f"--save-format {save_format}: stock LLaVA checkpoints hold an MLP projector and "
                "have no place for the scale-invariant connector; use --save-format xtuner"
            )
        save_trained_parts(self, cfg, Path(save_dir), fp32, dict(save_pretrained_kwargs or {}))

    def _freeze(self) -> None:
        if self.freeze_llm or self.use_llm_lora:
            self.llm.requires_grad_(False)
        if self.freeze_visual_encoder:
            self.visual_encoder.requires_grad_(False)

    def _load_pretrained(self, pretrained: Mapping[str, Tensor], source: str) -> None:
        expected = self.state_dict()
        encoder = "visual_encoder."
        is_of_images = not any(name.startswith(encoder) for name in pretrained)
        if is_of_images and hasattr(self.visual_encoder, "visual_tokens"):
            # LoRA and connector of stages on images are a start for slides.
            expected = {n: t for n, t in expected.items() if not n.startswith(encoder)}
        check_names(expected, pretrained, what="trained part of the model", source=source)
        self.load_state_dict(dict(pretrained), strict=False)
        print_log(f"Loaded {len(expected)} tensors from {source}", "current")


def _warn_of_plain_xtuner() -> None:
    """Says in one line what MMEngine's assertion about AmpOptimWrapper on a CPU will not say."""
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
        FileNotFoundError: A folder that is not there.
    """
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Mapping):
        from xtuner.registry import BUILDER

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
    from xtuner.registry import BUILDER

    name = value.get("pretrained_model_name_or_path")
    if name is not None:
        # Otherwise transformers asks on the terminal whether to run the code of a folder with
        # `auto_map`, and takes the answer from piped input.
        value.setdefault("trust_remote_code", False)
    try:
        if name is not None:
            check_model_name(name)
        if max_position_embeddings is not None:
            value["config"] = _stretched_config(name, max_position_embeddings)
        traverse_dict(value)
        return BUILDER.build(value)
    except (OSError, HFValidationError) as error:  # the second one for absolute paths
        raise FileNotFoundError(f"language model {name!r} cannot be loaded: {error}") from error


def _stretched_config(name: str, max_position_embeddings: int) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if max_position_embeddings > config.max_position_embeddings:
        factor = -(-max_position_embeddings // config.max_position_embeddings)
        config.rope_scaling = {"rope_type": "linear", "factor": float(factor)}
    return config


def _add_lora(llm: nn.Module, lora: Any) -> nn.Module:
    from peft import get_peft_model
    from xtuner.registry import BUILDER

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
    # XTuner's way would first copy a half-precision base to fp32: twice the memory for nothing.
    return get_peft_model(llm, config)


def _from_checkpoint(
    asked: bool | None, width: int, pretrained: Mapping[str, Tensor] | None, source: object
) -> dict[str, Any]:
    """Mode and feed-forward width: an earlier stage's connector decides, where there is one."""
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
