"""Files that a kill at any moment leaves whole, and a run folder that belongs to one process."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .config import UserError


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Fills a file under a temporary name of this process, forces it to the disk, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: str | Path, option: str) -> Path:
    """The folder, made if it is not there. Raises UserError where that can't be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{option}={path} can't be made ({e.strerror}): give another folder.") from None
    return path


def lock(folder: Path) -> Any:
    """Holds the folder for this process; the lock ends with it, however it ends. Raises UserError if it is taken."""
    handle = open(folder / ".lock", "w")  # noqa: SIM115  (open as long as the run)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise UserError(f"{folder} is in use by another process: wait for it, or give another output=.") from None
    return handle
