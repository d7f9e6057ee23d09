"""PA-LLaVA stage 1 with Mistral-7B-Instruct-v0.3, in the tokenizer's own chat template."""

from mmengine.config import read_base

with read_base():
    from .pallava_domain_alignment import *

llm_name_or_path = "mistralai/Mistral-7B-Instruct-v0.3"
tokenizer.update(pretrained_model_name_or_path=llm_name_or_path)
model["llm"].update(pretrained_model_name_or_path=llm_name_or_path)
model["llm_lora"].update(
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
prompt_template = "tokenizer"
train_dataloader["dataset"].update(tokenizer=tokenizer, template_map_fn=prompt_template)
custom_hooks[2].update(tokenizer=tokenizer)
custom_hooks[3].update(tokenizer=tokenizer, prompt_template=prompt_template)
