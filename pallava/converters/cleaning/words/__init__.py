"""Word lists of the keyword rules, as JSON."""
