"""Official checkpoints: read without trust, fetched, verified, converted."""

from .convert import Conversion, convert
from .fetch import fetch
from .machine import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint
from .manifest import Ledger, Released, find, manifest, sha256
from .reader import Limits, read_checkpoint

__all__ = [
    "CheckpointError",
    "Conversion",
    "CorruptCheckpoint",
    "Ledger",
    "Limits",
    "Released",
    "UnsafeCheckpoint",
    "convert",
    "fetch",
    "find",
    "manifest",
    "read_checkpoint",
    "sha256",
]
