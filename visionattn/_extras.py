"""What is said where an extra is missing. For every room."""

import sys


def missing_extra(message: str) -> BaseException:
    """What to raise: ImportError, or SystemExit with the same one line under ``python -m visionattn.room.command``."""
    # sys.argv[0] is '-m' only while the packages above the module to run are imported
    return SystemExit(message) if sys.argv[:1] == ["-m"] else ImportError(message)
