"""PLIP pretraining of `xtuner-add demo`; paths are relative to the demo's folder."""

from mmengine.config import read_base

with read_base():
    from .plip_pretraining_tiny import *

from xtuner_add.demo.pallava.training_data import SlidePairDataset

data_path = "data/pairs.jsonl"
batch_size = 48
max_epochs = 10
lr = 1e-3

# Initial weights get the standard deviation that suits the width of the small text encoder (128 **
# -0.5). With BERT's default, all captions start with nearly the same embedding, and the words that
# distinguish them are learned late.
model["text_encoder"].update(initializer_range=0.09)
model.update(tokenizer=dict(pairs_file=data_path))
train_dataloader.update(batch_size=batch_size)
train_dataloader["dataset"].update(type=SlidePairDataset, pairs_file=data_path, image_folder="data")
optim_wrapper["optimizer"].update(lr=lr)
param_scheduler[0].update(end=0.5)
param_scheduler[1].update(begin=0.5, end=max_epochs, eta_min=lr / 50)
train_cfg.update(max_epochs=max_epochs)
default_hooks["checkpoint"].update(interval=1)
