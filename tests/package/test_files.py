"""Files that are whole at any moment, and folders with one owner."""

import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from visionattn import _files
from visionattn._files import atomic_write, lock, replacing, sweep


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    atomic_write(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode() and stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    atomic_write(path, b"\0")
    atomic_write(path, lambda f: f.write(b"\1"))
    assert path.read_bytes() == b"\1"
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"\1"
            raise error
    with pytest.raises(FileNotFoundError), replacing(path):  # nothing was written
        pass
    with pytest.raises(IsADirectoryError):
        atomic_write(path.parent, b"")
    assert path.read_bytes() == b"\1" and names(tmp_path) == ["new"] and names(path.parent) == ["file"]


WRITER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from _files import atomic_write, lock  # without the seconds of the package's own import
path = Path(sys.argv[2])
handle = lock(path.parent, ValueError, "")
print("held", flush=True)
while True:
    atomic_write(path, os.urandom(1) * 200_000)
"""


def test_a_killed_process(tmp_path):
    """Its file is whole, its lock is free, and what it left goes, while files of other names stay."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"")
    for name in (".file.bin.1.tmp", ".other.1.tmp", ".notes.tmp"):
        (tmp_path / name).touch()
    command = [sys.executable, "-c", WRITER, str(Path(_files.__file__).parent), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"held\n"
        with pytest.raises(KeyError, match=r"is in use by another process: wait for it, or go away\."):
            lock(tmp_path, KeyError, "go away")
        seen = set()
        while len(seen) < 3:
            content = path.read_bytes()
            assert content == content[:1] * len(content) and len(content) in (0, 200_000)
            seen.add(content[:1])
        writer.kill()
    with lock(tmp_path, KeyError, ""):
        sweep(tmp_path, "*.bin", "sub/*")
        assert names(tmp_path) == [".lock", ".notes.tmp", ".other.1.tmp", "file.bin"]
        sweep(tmp_path.parent, f"{tmp_path.name}/*")
        assert names(tmp_path) == [".lock", ".notes.tmp", "file.bin"]
    with lock(tmp_path, KeyError, ""), pytest.raises(KeyError, match="in use"):  # of this process, too
        lock(tmp_path, KeyError, "")


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(KeyError, match=r"lacking can't be written \(No such file or directory\): give another\."):
        lock(tmp_path / "lacking", KeyError, "give another")


def test_threads_of_one_process(tmp_path):
    """Two of them write one file at once: it is one of theirs, whole."""
    path, errors = tmp_path / "file", []

    def write(byte):
        try:
            for _ in range(20):
                atomic_write(path, byte * 100_000)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(b,)) for b in (b"a", b"b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and path.read_bytes() in (b"a" * 100_000, b"b" * 100_000) and names(tmp_path) == ["file"]
