"""One console script, launchers and plug-ins around XTuner for pathology models."""
