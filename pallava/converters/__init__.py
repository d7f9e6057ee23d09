"""Public datasets as training files: `pairs.jsonl`, `conversations.jsonl`, folders of classes.

One module per dataset; each registers a function with `pallava.registry.CONVERTERS`. Cleaning, the
step from pairs to conversations, and the jobs' machinery stand beside them.
"""
