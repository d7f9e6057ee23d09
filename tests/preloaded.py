"""Imports once what the processes of `tests.warm_python` need, before they are forked."""

import gc
from importlib import import_module

for name in (
    *("pallava.engine.runtime", "pallava.engine.parts", "xtuner.tools.train"),
    *("xtuner_add.run_mode", "xtuner_add.training_check"),
    *("transformers.models.llama.modeling_llama", "transformers.models.clip.modeling_clip"),
    *("mmcls.apis", "mmcls.models", "mmcls.datasets"),
    *("mmpretrain.apis", "mmpretrain.models", "mmpretrain.datasets"),
    "open_clip_train.main",
):
    import_module(name)

gc.freeze()  # as `tests.conftest` does, for all forks
