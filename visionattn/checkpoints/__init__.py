"""Official checkpoints: read without trust, verified, converted."""

from .reader import CheckpointError, CorruptCheckpoint, Limits, UnsafeCheckpoint, read_checkpoint

__all__ = ["CheckpointError", "CorruptCheckpoint", "Limits", "UnsafeCheckpoint", "read_checkpoint"]
