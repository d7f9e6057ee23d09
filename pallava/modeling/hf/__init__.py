"""PA-LLaVA as a Hugging Face model; importing this package registers it with the Auto classes.

    import pallava.modeling.hf
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

The modules of this package and their imports are copied into every exported folder, so that
`trust_remote_code=True` loads the folder where this package is not installed.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from pallava.modeling.hf.configuration_pallava import PALLaVAConfig
from pallava.modeling.hf.modeling_pallava import PALLaVAForConditionalGeneration
from pallava.modeling.hf.processing_pallava import PALLaVAProcessor

__all__ = ["PALLaVAConfig", "PALLaVAForConditionalGeneration", "PALLaVAProcessor"]

AutoConfig.register(PALLaVAConfig.model_type, PALLaVAConfig, exist_ok=True)
AutoModelForImageTextToText.register(PALLaVAConfig, PALLaVAForConditionalGeneration, exist_ok=True)
AutoProcessor.register(PALLaVAConfig, PALLaVAProcessor, exist_ok=True)
