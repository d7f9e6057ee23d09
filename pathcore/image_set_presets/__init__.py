"""Labelled image sets as JSON: classes, layout on disk, wordings of prompts and answers."""
