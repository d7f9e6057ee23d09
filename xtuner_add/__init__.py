"""One console script, launchers and plug-ins around XTuner for pathology models."""

__version__ = "0.1.0"
