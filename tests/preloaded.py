"""Modules that `tests.warm_python` imports once, before it forks the processes of the tests."""

import xtuner.tools.train  # noqa: F401

import xtuner_add.run_mode
import xtuner_add.training_check  # noqa: F401
