"""Loads a trained PA-LLaVA from its folders; see `load_model`."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pallava.text.chat_template import known_template
from pallava.text.encoding import Bos
from pallava.text.templates import TOKENIZER_TEMPLATE, PromptTemplate, find_template
from pathcore.extras import says_extra
from pathcore.files import StrPath

if TYPE_CHECKING:
    import torch

    from pallava.anyres import GridTies
    from pallava.inference.assistant import Assistant

_logger = logging.getLogger(__name__)

_USUAL_TEMPLATE = "llama3_chat"
_USUAL_LAYER = -2
CONVERSION_NAME = "conversion.json"
"""File in a converted folder that records settings of the training config: the prompt template, the
layer of the encoder and the preparation of images."""

_EXPORTED_TYPE = "pallava"  # model_type in an exported folder's config.json
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_QUANTISED = "quantization_config"
_NAMED = "encoder:"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SMALL = (".json", ".txt", ".model", ".jinja")
# 32 samples of 64 KiB read 2 MiB of a weight file, where hashing all of it would read gigabytes.
_SAMPLES, _SAMPLE_BYTES = 32, 64 << 10


@says_extra("pallava.load_model", "evaluate")
def load_model(
    llm: StrPath,
    llava: StrPath | None = None,
    visual_encoder: StrPath | None = None,
    *,
    prompt_template: str | None = None,
    bos: Bos = "single",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    use_adapter: bool | None = None,
    visual_select_layer: int | None = None,
) -> Assistant:
    """Loads a trained PA-LLaVA for inference.

    Args:
        llm: Folder or Hub name of the language model, either the base model, to which the adapter
            in `llava` is applied, or a model with the adapter already merged. It may also be an
            exported folder, which holds all parts; `llava` and `visual_encoder` must then be None.
        llava: Folder written by `xtuner convert pth_to_hf`, with `projector/` and, if they were
            trained, `llm_adapter/` and `visual_encoder/`. Defaults to `llm`.
        visual_encoder: Folder of a PLIP, CLIP or slide token encoder, or `encoder:NAME` with a name
            of `pathcore.encoders`. Defaults to the one in `llava`.
        prompt_template: XTuner name of a prompt template, or `tokenizer`. Defaults to the template
            used in training, which both kinds of folder record; a different one logs a warning.
        bos: `double` prepends two BOS tokens, as the published evaluation tools do.
        dtype: A torch dtype, `fp16`, `bf16`, `fp32` or `auto` (as stored). Defaults to bf16 or fp16
            on a GPU and fp32 on a CPU.
        device: Device of the model. Defaults to the current GPU if there is one.
        use_adapter: Whether to apply `llava/llm_adapter`. By default it is applied if it exists,
            unless `llm` lies inside `llava`: that is where `xtuner convert merge` writes the merged
            model, which already contains the adapter.
        visual_select_layer: Index of the encoder's hidden state that the connector reads. Defaults
            to the one used in training, or -2 if `llava` does not record it; a different one logs a
            warning. An exported folder has its own, and this must then be None.

    Returns:
        A model with `answer(image, question)` and `answer_batch(images, questions)`.

    Raises:
        FileNotFoundError: If a folder does not exist or lacks a part.
        CheckpointError: If the weights of the parts do not fit each other.
        ValueError: If parts or the layer are named beside an exported folder, which has its own.

    Example::

        from pallava import load_model
        model = load_model("Meta-Llama-3-8B-Instruct", "instruction_tuning_ft", "plip")
        print(model.answer("biopsy.png", "Is there necrosis?"))
    """
    from pallava.inference.assistant import Assistant
    from pallava.modeling.folders import load_connector
    from pallava.modeling.llava import PALLaVA
    from pathcore.device_claims import choose_device
    from pathcore.weights import CheckpointError

    place = choose_device(device)
    precision = _precision(dtype, place)
    if _is_exported(llm):
        if llava is not None or visual_encoder is not None:
            raise ValueError(f"{llm} contains all parts; omit llava and visual_encoder")
        if visual_select_layer is not None:
            raise ValueError(
                f"{llm} states the layer of its encoder in config.json, found visual_select_layer "
                f"{visual_select_layer} as well; leave it out"
            )
        return _load_exported(Path(llm), precision, place, prompt_template, bos)
    folder = _llava_folder(llava if llava is not None else llm)
    encoder_folder = _encoder_folder(folder, visual_encoder)
    connector = load_connector(folder / "projector")
    record = _read_record(folder)
    sub_images = connector.uses_sub_images and record.sub_images
    encoder, prepare = _load_encoder(encoder_folder, sub_images, record)
    if encoder.config.hidden_size != connector.config.visual_hidden_size:
        raise CheckpointError(
            f"{folder / 'projector'} connects an encoder {connector.config.visual_hidden_size} "
            f"wide, {encoder_folder} is {encoder.config.hidden_size} wide"
        )
    language_model, tokenizer = _load_llm(llm, precision)
    width = language_model.get_input_embeddings().weight.shape[1]
    if width != connector.config.llm_hidden_size:
        raise CheckpointError(
            f"{folder / 'projector'} gives embeddings {connector.config.llm_hidden_size} wide, the "
            f"language model {llm} takes {width}; is it the one used in training?"
        )
    adapter = _adapter_folder(llm, folder, use_adapter)
    if adapter is not None:
        language_model = _add_adapter(language_model, adapter)
    stored = language_model.get_input_embeddings().weight.dtype
    parts = PALLaVA(
        language_model,
        encoder.to(precision or stored),
        connector.to(precision or stored),
        visual_select_layer=_choose_layer(
            visual_select_layer,
            record.visual_select_layer,
            getattr(encoder.config, "num_hidden_layers", 0) + 1,  # a slide encoder has no layers
            folder,
        ),
    )
    parts.requires_grad_(False).to(place)
    return Assistant(
        parts,
        tokenizer,
        prepare,
        prompt_template=_choose_template(prompt_template, record.prompt_template, folder),
        bos=bos,
        fingerprint=_fingerprint(llm, folder / "projector", encoder, encoder_folder, adapter),
    )


def _fingerprint(
    llm: StrPath, projector: Path, encoder: Any, encoder_folder: Path | str, adapter: Path | None
) -> str:
    if isinstance(encoder_folder, Path):
        return fingerprint(llm, projector, encoder_folder, adapter)
    from pallava.named_encoder import identity

    parts = f"{fingerprint(llm, projector, adapter)}\0{identity(encoder)}"
    return hashlib.sha256(parts.encode()).hexdigest()


def fingerprint(llm: StrPath, *folders: Path | None) -> str:
    """Returns a hash that identifies a set of weights without reading gigabytes.

    Configs and tokenizers are hashed whole; of weight files, the size and 32 samples of 64 KiB.

    Args:
        llm: Folder or Hub name of the language model.
        folders: Folders of the other parts; None for a part that is not used.
    """
    digest = hashlib.sha256()
    for folder in (_local_folder(llm), *folders):
        digest.update(b"folder\0")
        for file in sorted(folder.iterdir()) if folder is not None else ():
            if file.is_file() and file.suffix in (*_WEIGHTS, *_SMALL):
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                _digest_file(digest, file)
    return digest.hexdigest()


def _digest_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    if file.suffix in _SMALL or size <= _SAMPLES * _SAMPLE_BYTES:
        digest.update(file.read_bytes())
        return
    step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
    with file.open("rb") as content:
        for index in range(_SAMPLES):
            content.seek(index * step)
            digest.update(content.read(_SAMPLE_BYTES))


def _local_folder(llm: StrPath) -> Path:
    if Path(llm).is_dir():
        return Path(llm)
    from transformers.utils import cached_file

    config = cached_file(str(llm), "config.json")
    assert config is not None  # the model was loaded from there
    return Path(config).parent


def _llava_folder(llava: StrPath) -> Path:
    folder = Path(llava)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; --llava is what `xtuner-add convert pth_to_hf` writes, "
            "with projector/ in it"
        )
    if not (folder / "projector").is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder}: no projector/ in it, found {found}; turn a training checkpoint into "
            "folders with `xtuner-add convert pth_to_hf CONFIG CHECKPOINT FOLDER`"
        )
    return folder


def _encoder_folder(folder: Path, visual_encoder: StrPath | None) -> Path | str:
    trained = folder / "visual_encoder"
    if visual_encoder is not None and str(visual_encoder).startswith(_NAMED):
        if trained.is_dir():
            raise ValueError(
                f"{trained} holds the encoder that the connector was trained with; leave "
                "--visual-encoder out"
            )
        return str(visual_encoder)
    if trained.is_dir():
        if visual_encoder is not None and not _same_encoder(trained, Path(visual_encoder)):
            raise ValueError(
                f"{trained} holds the encoder that the connector was trained with, and the weights "
                f"in {visual_encoder} are others; leave --visual-encoder out"
            )
        return trained
    if visual_encoder is None:
        raise FileNotFoundError(
            f"{folder}: no visual_encoder/ in it; name the PLIP folder used in training with "
            "--visual-encoder"
        )
    return Path(visual_encoder)


def _same_encoder(first: Path, second: Path) -> bool:
    """Checks whether two folders hold the same weights, under Hugging Face's or published names.

    `pth-to-hf` copies even a frozen encoder into its output, so the published command lines pass
    `--visual-encoder` although the folder already contains that encoder.
    """
    if first.resolve() == second.resolve():
        return True
    import torch

    from pallava.modeling.plip import published_names
    from pathcore.weights import read_state_dict

    left, right = (published_names(read_state_dict(folder)) for folder in (first, second))
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name]) for name, tensor in left.items()
    )


def _adapter_folder(llm: StrPath, folder: Path, use_adapter: bool | None) -> Path | None:
    adapter = folder / "llm_adapter"
    if use_adapter is False or (use_adapter is None and not adapter.is_dir()):
        return None
    if not adapter.is_dir():
        raise FileNotFoundError(f"{folder}: no llm_adapter/ in it")
    merged_here = Path(llm).is_dir() and Path(llm).resolve().is_relative_to(folder.resolve())
    if use_adapter is None and merged_here:
        _logger.warning(
            "%s lies inside %s and is assumed to be merged: llm_adapter/ is not added",
            llm,
            folder,
        )
        return None
    return adapter


def _precision(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | None:
    """Resolves the dtype to load with; None keeps the stored dtype."""
    import torch

    if dtype is None:
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype == "auto":
        return None
    name = _DTYPES.get(str(dtype), str(dtype).removeprefix("torch."))
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}, auto")
    return found


def _is_exported(llm: StrPath) -> bool:
    file = Path(llm) / "config.json"
    try:
        return bool(json.loads(file.read_bytes()).get("model_type") == _EXPORTED_TYPE)
    except (OSError, ValueError, AttributeError):
        return False


def _load_exported(
    folder: Path,
    precision: torch.dtype | None,
    device: torch.device,
    prompt_template: str | None,
    bos: Bos,
) -> Assistant:
    from transformers import AutoProcessor

    from pallava.anyres import AnyRes
    from pallava.inference.assistant import Assistant
    from pallava.modeling.hf import PALLaVAForConditionalGeneration
    from pathcore.weights import check_loading_report

    # transformers does not move a quantised model after loading.
    is_quantised = bool(json.loads((folder / "config.json").read_bytes()).get(_QUANTISED))
    placement: dict[str, Any] = {"device_map": {"": device}} if is_quantised else {}
    try:
        model, report = PALLaVAForConditionalGeneration.from_pretrained(
            str(folder), output_loading_info=True, **placement, **_dtype_argument(precision)
        )
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # the latter without bitsandbytes
        raise FileNotFoundError(f"exported model {folder}: cannot be loaded: {error}") from error
    check_loading_report(report, model, what="exported model", source=folder)
    tokenizer = processor.tokenizer
    template: PromptTemplate | str
    if getattr(tokenizer, "chat_template", None):
        template = _choose_exported(prompt_template, tokenizer.chat_template, folder)
    else:
        template = _choose_template(prompt_template, None, folder)
    _make_greedy(model.llm, tokenizer)
    anyres = AnyRes(
        tile_px=processor.tile_px,
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
        sub_images=processor.sub_images,
        ties=processor.ties,
        pad_to_square=processor.pad_to_square,
    )
    model.requires_grad_(False)
    if is_quantised:
        # LLM.int8() computes in fp16, which bitsandbytes warns about at each layer and token.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    else:
        model.to(device)
    return Assistant(model, tokenizer, anyres, template, bos, fingerprint(folder))


class _Record(NamedTuple):
    """Settings of the training that inference needs; by default, those of the released weights."""

    prompt_template: PromptTemplate | None = None
    ties: GridTies = "published"
    visual_select_layer: int | None = None
    pad_to_square: bool = False
    sub_images: bool = True


def _read_record(folder: Path) -> _Record:
    """Reads the settings recorded beside trained weights.

    Raises:
        ValueError: If the record is damaged.
    """
    file = folder / CONVERSION_NAME
    if not file.is_file():
        return _Record()
    try:
        record = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object: {error}") from error
    known = {name: record[name] for name in _Record._fields if name in record}
    fields = known.pop("prompt_template", None)
    return _Record(PromptTemplate.from_fields(fields) if fields else None, **known)


def _choose_layer(asked: int | None, recorded: int | None, num_states: int, folder: Path) -> int:
    if asked is None:
        return _USUAL_LAYER if recorded is None else recorded
    if recorded is not None and (asked - recorded) % num_states:  # both may count from the end
        _logger.warning(
            "%s: the connector reads hidden state %d of the encoder as requested; it was trained "
            "with %d",
            folder,
            asked,
            recorded,
        )
    return asked


def _choose_template(
    asked: str | None, recorded: PromptTemplate | None, folder: Path
) -> PromptTemplate | str:
    if asked is None:
        if recorded is None:
            _logger.warning(
                "%s: does not record the prompt template used in training; %s is taken. Name "
                "another one with prompt_template",
                folder,
                _USUAL_TEMPLATE,
            )
        return recorded or _USUAL_TEMPLATE
    if asked == TOKENIZER_TEMPLATE:
        if recorded is not None and recorded.chat_template is None:
            _warn_of_other(folder, "the tokenizer's own chat template", recorded.name)
        return asked
    template = find_template(asked)
    if recorded is not None and not template.same_text(recorded):
        _warn_of_other(folder, repr(asked), recorded.name)
    return asked


def _choose_exported(asked: str | None, chat_template: str, folder: Path) -> str:
    """Chooses the template of an exported folder, whose tokenizer carries the training template."""
    if asked is None or asked == TOKENIZER_TEMPLATE:
        return TOKENIZER_TEMPLATE
    template, recorded = find_template(asked), known_template(chat_template)
    if recorded is None or not template.same_text(recorded):
        _warn_of_other(folder, repr(asked), recorded.name if recorded else TOKENIZER_TEMPLATE)
    return asked


def _warn_of_other(folder: Path, asked: str, recorded: str) -> None:
    _logger.warning(
        "%s: asked in the prompt template %s as requested; the model was trained with %r",
        folder,
        asked,
        recorded,
    )


def _dtype_argument(precision: torch.dtype | None) -> dict[str, Any]:
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    keyword = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"  # renamed there
    return {keyword: precision if precision is not None else "auto"}


def _load_llm(name: StrPath, precision: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pathcore.weights import check_loading_report

    try:
        check_model_name(name)
        # Without trust_remote_code=False, transformers prompts on the terminal whether to run the
        # code named by a folder's `auto_map`, and would read the answer from piped input.
        model, report = AutoModelForCausalLM.from_pretrained(
            str(name),
            trust_remote_code=False,
            output_loading_info=True,
            **_dtype_argument(precision),
        )
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        is_named = Path(name).is_dir() or isinstance(error, FileNotFoundError)
        where = "" if is_named else "no such folder, and the hub does not give it: "
        raise FileNotFoundError(
            f"language model {name}: cannot be loaded: {where}{_explain(error)}"
        ) from error
    check_loading_report(report, model, what="language model", source=name)
    _make_greedy(model, tokenizer)
    return model, tokenizer


def check_model_name(name: StrPath) -> None:
    """Rejects a path without a model before transformers mistakes it for a Hub name.

    Raises:
        FileNotFoundError: If the path holds no model.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("no config.json in this folder")
    elif folder.is_absolute() or str(name).startswith((".", "~")) or len(folder.parts) > 2:
        raise FileNotFoundError("no such folder, and not a name on the hub (owner/name)")


def load_tokenizer(name: StrPath, **options: Any) -> Any:
    """Loads a tokenizer by folder or hub name; code that comes with it is not run.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=False, **options)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        # transformers raises any of these if a file of the tokenizer is missing.
        where = "" if Path(name).is_dir() else "no such folder, and the hub does not give it: "
        raise ValueError(f"tokenizer {name}: cannot be loaded: {where}{_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Shortens an error of transformers to the part that helps the user."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "its config.json names custom code (auto_map), which is never run; expected a model "
            "whose class is part of transformers"
        )
    # transformers goes on to list every model type it supports.
    return " ".join(text.split("Model type should be one of")[0].split())


def _make_greedy(llm: Any, tokenizer: Any) -> None:
    """Resets the generation config, so that the sampling settings of chat models do not apply."""
    from transformers import GenerationConfig

    ends = llm.generation_config.eos_token_id
    llm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if ends is not None else tokenizer.eos_token_id,
    )


def _add_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    from pathcore.weights import CheckpointError, check_names, read_state_dict

    tensors = read_state_dict(folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{folder}: this adapter does not fit the language model: {error}"
        ) from error
    # PEFT only warns about missing and unexpected tensors.
    expected = get_peft_model_state_dict(adapted)
    check_names(expected, tensors, what="language model's adapter", source=str(folder))
    return adapted


def _load_encoder(folder: Path | str, sub_images: bool, record: _Record) -> tuple[Any, Any]:
    """Loads the encoder of a folder or a name and the preprocessing that belongs to it."""
    from pallava.anyres import AnyRes
    from pallava.named_encoder import NamedVisionEncoder, is_named_encoder, load_named_encoder

    if isinstance(folder, str) or is_named_encoder(folder):
        found = (
            NamedVisionEncoder(folder) if isinstance(folder, str) else load_named_encoder(folder)
        )
        transform = found.transform
        return found.eval(), AnyRes(
            tile_px=found.config.image_size,
            image_mean=transform.mean,
            image_std=transform.std,
            sub_images=sub_images,
            ties=record.ties,
            pad_to_square=record.pad_to_square,
        )
    from pallava.modeling.folders import (
        SLIDE_TOKENS_MODEL_TYPE,
        load_slide_encoder,
        load_vision_encoder,
    )
    from pallava.slide_bags import SlidePreparation

    file = folder / "config.json"
    if (
        file.is_file()
        and json.loads(file.read_bytes()).get("model_type") == SLIDE_TOKENS_MODEL_TYPE
    ):
        slides = load_slide_encoder(folder)
        config = slides.config
        return slides, SlidePreparation(
            config.in_features, config.slide_embedding_features, config.origin
        )
    images: Any = load_vision_encoder(folder)
    return images, _image_preparation(folder, images.config.image_size, sub_images, record)


def _image_preparation(folder: Path, tile_px: int, sub_images: bool, record: _Record) -> Any:
    from pallava.anyres import CLIP_MEAN, CLIP_STD, AnyRes

    file = folder / "preprocessor_config.json"
    stated = json.loads(file.read_bytes()) if file.is_file() else {}
    return AnyRes(
        tile_px=tile_px,
        image_mean=tuple(stated.get("image_mean", CLIP_MEAN)),
        image_std=tuple(stated.get("image_std", CLIP_STD)),
        sub_images=sub_images,  # without cross-attention the connector ignores them
        ties=record.ties,
        pad_to_square=record.pad_to_square,
    )
