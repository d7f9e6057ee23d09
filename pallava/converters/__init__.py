"""Converts public datasets to `pairs.jsonl`, `conversations.jsonl` or class folders.

Each dataset has a module that registers a function with `pallava.registry.CONVERTERS`. Cleaning,
the conversion of pairs to conversations, and the job machinery are separate modules.
"""
