"""Language models that write about patches: describe, revise, summarise, make instructions.

Each agent is one step from JSON lines to JSON lines and knows nothing of the others.
"""
