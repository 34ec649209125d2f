"""Files that a kill at any moment leaves whole, and folders that belong to one process. Open to every room."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to fill; at the end it is forced to the disk and takes the name.

    Until then the old file stays; if the body raises, it stays for good, and the temporary one goes. The folder is
    made where it lacks. The temporary name holds the thread's number (a process's own, in its main thread): two never
    write into one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some network file systems can't: the name is there all the same
        _sync(path.parent)


def atomic_write(path: Path, content: bytes | str | Callable[[BinaryIO], Any]) -> None:
    """:func:`replacing` with bytes, text (as UTF-8), or what a function writes into the open binary file."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        if callable(content):
            content(f)
        else:
            f.write(content.encode() if isinstance(content, str) else content)


def sweep(folder: Path, *patterns: str) -> None:
    """Removes the temporary files that killed processes left of files that match a pattern (``*.png``, ``sub/*``).

    For who holds the folder: the temporary file of a process that is alive would go too.
    """
    for pattern in patterns:
        path = PurePosixPath(pattern)
        for left in folder.glob(str(path.with_name(f".{path.name}.[0-9]*.tmp"))):
            left.unlink(missing_ok=True)


def lock(folder: Path, error: type[Exception], advice: str) -> TextIO:
    """Holds the folder for this process until the returned file is closed, or the process ends, however it ends.

    Raises:
        error: where another process holds it, or the folder can't be written; its message ends with ``advice``.
    """
    try:
        handle = open(folder / ".lock", "w")  # noqa: SIM115  (open as long as the folder is held)
    except OSError as e:
        raise error(f"{folder} can't be written ({e.strerror}): {advice}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise error(f"{folder} is in use by another process: wait for it, or {advice}.") from None
    return handle


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
