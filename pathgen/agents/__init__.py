"""Language models that write about patches: describe, revise, summarise, make instructions.

Each agent is one step that maps JSON lines to JSON lines, independent of the others.
"""
