"""Runner that adapts a config to the machine, so that plain `xtuner train` does so too."""

from __future__ import annotations

from typing import Any

from mmengine.runner import Runner

from pallava.engine.runtime import adapt_config


class AdaptedRunner(Runner):
    """MMEngine's runner, built from a config that `adapt_config` has adapted to this machine.

    Configs name it as `runner_type`, which is the first that XTuner builds from a config: early
    enough to open the process group before MMEngine does. Under DeepSpeed, XTuner takes MMEngine's
    `FlexibleRunner` instead, and only `xtuner-add train` adapts the config.
    """

    @classmethod
    def from_cfg(cls, cfg: Any) -> Runner:
        """Builds the runner from a config, which it does not change."""
        return super().from_cfg(adapt_config(cfg.copy()))
