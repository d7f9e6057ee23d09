"""What joins PA-LLaVA to MMEngine and XTuner: runtime, hooks, samplers, optimizer, registries.

`custom_imports = dict(imports=["pallava.engine"])` in a config makes every part available by name,
through MMEngine's registries and XTuner's `BUILDER`.
"""

import mmengine.hooks  # before the loop below: MMEngine looks names up while it is imported
import mmengine.model  # noqa: F401
from mmengine.registry import DATASETS, HOOKS, MODELS
from xtuner.registry import BUILDER

# The modules of the parts import this package, and some of them XTuner, which takes ten seconds. So
# the registries import them at the first look-up, as MMEngine does with its own locations.
for _registry in (MODELS, DATASETS, HOOKS, BUILDER):
    _registry._locations.append("pallava.engine.parts")
    _registry._imported = False
del _registry
