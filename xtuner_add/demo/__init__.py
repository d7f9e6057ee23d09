"""The two demos, and what they share: painted tissue, stages that resume, a report."""
