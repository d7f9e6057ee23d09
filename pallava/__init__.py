"""PA-LLaVA: pathology vision encoder, scale-invariant connector, language model."""

from typing import TYPE_CHECKING

from pathcore.lazy import lazy_exports

if TYPE_CHECKING:
    from pallava.evaluation.runs import evaluate as evaluate
    from pallava.inference.loading import load_model as load_model
    from pallava.release.export import export as export
    from pallava.release.merge import merge as merge
    from pallava.release.pth_to_hf import convert_checkpoint as convert_checkpoint

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    "evaluate",
    {
        "convert_checkpoint": "pallava.release.pth_to_hf",
        "evaluate": "pallava.evaluation.runs",
        "export": "pallava.release.export",
        "load_model": "pallava.inference.loading",
        "merge": "pallava.release.merge",
    },
)
