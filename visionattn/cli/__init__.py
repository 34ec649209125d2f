"""The command line: ``visionattn`` and ``python -m visionattn``. One file a group of commands."""

from .main import main

__all__ = ["main"]
