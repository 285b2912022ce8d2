"""Prefixes of other projects: one module per format, from a file to a `SavedPrefix` and back where the format can."""
