"""Class lists, prompts and layouts of public data sets, as JSON."""
