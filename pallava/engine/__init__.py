"""What joins PA-LLaVA to MMEngine and XTuner: runtime, hooks, samplers, optimizer."""
