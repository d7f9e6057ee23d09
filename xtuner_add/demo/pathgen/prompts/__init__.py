"""What the demo asks its small describer: one line each, since it has read nothing else."""
