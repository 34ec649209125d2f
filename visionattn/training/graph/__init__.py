"""Training on graphs: stochastic block models (PATTERN, CLUSTER) and superpixels.

``python -m visionattn.training.graph --config configs/graph/pattern.yaml --max-seconds 120``
"""
