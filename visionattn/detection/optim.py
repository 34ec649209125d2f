"""Layer decay."""
