"""Integration with MMEngine and XTuner: runtime, hooks, samplers, optimizer, registries.

With `custom_imports = dict(imports=["pallava.engine"])` in a config, every part is available by
name through MMEngine's registries and XTuner's `BUILDER`.
"""

import mmengine.hooks  # before the loop below, since MMEngine looks up names on import
import mmengine.model  # noqa: F401
from mmengine.registry import DATASETS, HOOKS, MODELS
from xtuner.registry import BUILDER

# The registries import the modules of the parts on first look-up, as MMEngine does with its own
# locations: they import this package, and some of them XTuner, which takes ten seconds.
for _registry in (MODELS, DATASETS, HOOKS, BUILDER):
    _registry._locations.append("pallava.engine.parts")
    _registry._imported = False
del _registry
