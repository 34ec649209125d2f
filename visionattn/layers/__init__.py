"""One published mechanism, one file; and the registry of modules."""
