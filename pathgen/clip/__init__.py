"""CLIP models: shards of pairs, training through OpenCLIP, export, zero-shot evaluation."""
