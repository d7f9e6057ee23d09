"""Sub-commands of ``xtuner-add``, one module per subject."""
