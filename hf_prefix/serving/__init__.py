"""Many saved prefixes on one running model."""
