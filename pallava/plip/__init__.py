"""PLIP pretraining: image-text contrast and matching with momentum queues."""
