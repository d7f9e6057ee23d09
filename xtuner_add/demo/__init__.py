"""Both demos and their shared parts: painted tissue, resumable stages, a report."""
