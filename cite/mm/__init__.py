"""CITE for MMPreTrain and MMClassification, by `custom_imports = dict(imports=["cite.mm"])`.

Everything is registered in MMEngine's root registries, where both hosts find it; modules registered
in MMClassification would be invisible to MMPreTrain.
"""

from __future__ import annotations

from cite.mm import backbones as backbones
from cite.mm import datasets as datasets
from cite.mm import features as features
from cite.mm import few_shot as few_shot
from cite.mm import heads as heads
from cite.mm import hooks as hooks
from cite.mm import metrics as metrics
from cite.mm import published as published
from cite.mm import samplers as samplers
from cite.mm import transforms as transforms
