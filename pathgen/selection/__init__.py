"""Representative patches of slides: selection, and the job over many slides."""
