"""Adapts a run to its machine: device, precision, communication, and compatibility shims.

`adapt_config()` lets a config that was written for CUDA train on other machines. `prepare_host()`
applies, once per process, the shims that xtuner 0.2.0 and mmengine 0.10 need with
newer versions of torch and DeepSpeed. Nothing in this module runs on import.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

from pathcore.deferred_imports import after_import

_logger = logging.getLogger(__name__)

_ONEBIT = "deepspeed.runtime.fp16.onebit"
_SINGLE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}
_HOOKS = ("StopOnDivergenceHook", "StartScreenHook", "ThroughputHook", "WorkDirHook")
# MMEngine's default wrapper, but without the `device_ids=[LOCAL_RANK]` that it passes by default
# and DDP rejects on a CPU.
_CPU_WRAPPER = {
    "type": "MMDistributedDataParallel",
    "broadcast_buffers": False,
    "find_unused_parameters": False,
    "device_ids": None,
}


def adapt_config(cfg: Any) -> Any:
    """Adapts a loaded config, for instance a published one, to this machine; modifies it in place.

    On a machine without CUDA, mixed precision and NCCL are replaced by fp32 and gloo; on a GPU
    without bfloat16, float16 with dynamic loss scaling takes its place. Learning-rate factors of
    `paramwise_cfg` move into the optimizer, because XTuner silently drops `paramwise_cfg` under
    DeepSpeed.
    """
    import torch

    prepare_host()
    optim_wrapper = cfg.get("optim_wrapper")
    if optim_wrapper:
        _keep_learning_rates(optim_wrapper)
        hooks = list(cfg.get("custom_hooks") or ())
        if not any(_type_name(hook.get("type")).endswith(_HOOKS[0]) for hook in hooks):
            import pallava.engine.hooks  # noqa: F401  registers the hooks

            cfg.custom_hooks = [*hooks, *({"type": name} for name in _HOOKS)]
    mixed = optim_wrapper and _type_name(optim_wrapper.get("type")).endswith("AmpOptimWrapper")
    if torch.cuda.is_available():
        if (
            mixed
            and optim_wrapper.get("dtype") == "bfloat16"
            and not torch.cuda.is_bf16_supported()
        ):
            _logger.warning("no bfloat16 on this GPU: the config's bfloat16 becomes float16")
            optim_wrapper.update(dtype="float16", loss_scale="dynamic")
        return cfg
    if mixed:
        _logger.warning(
            "no GPU: mixed precision (%s) of the config becomes fp32",
            optim_wrapper.get("dtype", "float16"),
        )
        optim_wrapper["type"] = "OptimWrapper"
        for name in ("loss_scale", "dtype", "use_fsdp"):
            optim_wrapper.pop(name, None)
    if (cfg.get("env_cfg") or {}).get("dist_cfg", {}).get("backend") == "nccl":
        cfg.env_cfg.dist_cfg.backend = "gloo"
    if optim_wrapper and cfg.get("model_wrapper_cfg") is None:
        cfg.model_wrapper_cfg = dict(_CPU_WRAPPER)
    return cfg


def _keep_learning_rates(optim_wrapper: Any) -> None:
    """Moves `paramwise_cfg.custom_keys.*.lr_mult` into `GroupedAdamW`, which DeepSpeed keeps."""
    paramwise = optim_wrapper.get("paramwise_cfg")
    optimizer = optim_wrapper.get("optimizer")
    if (
        not paramwise
        or not optimizer
        or _type_name(optimizer.get("type")).split(".")[-1] != "AdamW"
    ):
        return
    keys = paramwise.get("custom_keys", {})
    if set(paramwise) != {"custom_keys"} or any(set(rule) != {"lr_mult"} for rule in keys.values()):
        return
    from pallava.engine.optim import PARTS

    if not set(keys) <= set(PARTS):
        return
    optimizer["type"] = "GroupedAdamW"
    optimizer["lr_mult"] = {key: float(rule["lr_mult"]) for key, rule in keys.items()}
    optim_wrapper.pop("paramwise_cfg")


def _type_name(value: Any) -> str:
    if isinstance(value, str):
        return value
    # Types in a new-style config are lazy objects that know their dotted path.
    return getattr(value, "__qualname__", None) or str(getattr(value, "dotpath", value))


@lru_cache(maxsize=1)
def prepare_host() -> None:
    """Installs the shims that this process needs; repeated calls do nothing."""
    import torch

    _allow_training_checkpoints()
    if importlib.util.find_spec("deepspeed") is not None:
        after_import("deepspeed", _fit_deepspeed)
    if "--deepspeed" in sys.argv and "RANK" not in os.environ:
        # Without a launcher's environment variables, DeepSpeed requires mpi4py.
        for name, value in (_SINGLE_PROCESS | {"MASTER_PORT": str(_free_port())}).items():
            os.environ.setdefault(name, value)
    if not torch.cuda.is_available():
        if not hasattr(torch.cpu, "is_bf16_supported"):
            # xtuner calls this function of the device's module, which torch lacks for CPU.
            torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]
        _open_gloo_group()


def _allow_training_checkpoints() -> None:
    """Allowlists the types in MMEngine's checkpoints for `torch.load(weights_only=True)`."""
    import torch
    from mmengine.logging import HistoryBuffer

    from pathcore.weights import safe_types

    torch.serialization.add_safe_globals(safe_types(HistoryBuffer))


def _fit_deepspeed() -> None:
    import torch

    _provide_onebit()
    if not torch.cuda.is_available():
        _skip_shared_memory_extension()


def _provide_onebit() -> None:
    """Stubs three unused optimizers that MMEngine registers and DeepSpeed 0.19.7 removed."""
    if importlib.util.find_spec(_ONEBIT) is not None:
        return
    module = ModuleType(_ONEBIT)
    for name in ("OnebitAdam", "OnebitLamb", "ZeroOneAdam"):
        setattr(module, name, type(name, (), {"__init__": _removed_optimizer}))
    sys.modules[_ONEBIT] = module


def _removed_optimizer(self: object, *args: object, **kwargs: object) -> None:
    del args, kwargs
    raise ValueError(
        f"optimizer {type(self).__name__}: this DeepSpeed version no longer has it; use AdamW"
    )


def _skip_shared_memory_extension() -> None:
    """Disables an extension that DeepSpeed would compile for minutes; gloo does the same work."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _open_gloo_group() -> None:
    """Opens the process group before MMEngine does, which would call CUDA even for gloo."""
    import torch.distributed as dist

    from pathcore.ranks import open_gloo_group

    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        open_gloo_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
