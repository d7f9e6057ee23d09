"""PathGen: selects patches of slides, captions them and trains a CLIP on the captions."""

from typing import TYPE_CHECKING

from pathcore.lazy import lazy_exports

if TYPE_CHECKING:
    from pathcore.chat_backends import OpenAIBackend as OpenAIBackend
    from pathcore.chat_local import LocalBackend as LocalBackend
    from pathcore.image_sets import load_image_set as load_image_set
    from pathgen.agents.captions import describe as describe
    from pathgen.agents.captions import revise as revise
    from pathgen.agents.captions import summarise as summarise
    from pathgen.agents.steps import run_step as run_step
    from pathgen.annotations import read_annotations as read_annotations
    from pathgen.clip.recipe import read_recipe as read_recipe
    from pathgen.clip.training import train_clip as train_clip
    from pathgen.clip.zero_shot import zero_shot as zero_shot
    from pathgen.selection.job import select_patches as select_patches

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    "pathgen",
    {
        "LocalBackend": "pathcore.chat_local",
        "OpenAIBackend": "pathcore.chat_backends",
        "describe": "pathgen.agents.captions",
        "load_image_set": "pathcore.image_sets",
        "read_annotations": "pathgen.annotations",
        "read_recipe": "pathgen.clip.recipe",
        "revise": "pathgen.agents.captions",
        "run_step": "pathgen.agents.steps",
        "select_patches": "pathgen.selection.job",
        "summarise": "pathgen.agents.captions",
        "train_clip": "pathgen.clip.training",
        "zero_shot": "pathgen.clip.zero_shot",
    },
)
