"""ELA in detectors."""
