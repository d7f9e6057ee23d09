"""PLIP pretraining from scratch, with all parts of the full recipe, within minutes on a CPU.

    xtuner-add train configs/pallava/plip_pretraining_tiny.py \
        --cfg-options train_dataloader.dataset.pairs_file=pairs.jsonl \
                      train_dataloader.dataset.image_folder=images \
                      model.tokenizer.pairs_file=pairs.jsonl
"""

from mmengine.config import read_base

with read_base():
    from .plip_pretraining import *

data_path = "data/plip_tiny/pairs.jsonl"
image_folder = "data/plip_tiny/images"
image_size = 64
batch_size = 16
max_epochs = 60
lr = 5e-4
warmup_epochs = 1

model.update(
    visual_encoder=dict(
        image_size=image_size,
        patch_size=16,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
    ),
    text_encoder=dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    tokenizer=dict(pairs_file=data_path, vocab_size=2000),
    embed_dim=64,
    queue_size=256,
    momentum=0.95,  # lower than 0.995, since the momentum encoders must keep up in a short run
    alpha=0.2,
)
train_dataloader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
train_dataloader.dataset.update(
    pairs_file=data_path, image_folder=image_folder, image_size=image_size
)
optim_wrapper.optimizer.update(lr=lr)
param_scheduler[0].update(end=warmup_epochs)
param_scheduler[1].update(begin=warmup_epochs, end=max_epochs, eta_min=lr / 10)
train_cfg.update(max_epochs=max_epochs)
default_hooks.checkpoint.update(interval=max_epochs)
