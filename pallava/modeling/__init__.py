"""The networks, in torch and transformers alone; nothing here needs MMEngine or XTuner."""
