"""Downloads that resume, and that never leave a half-written file under the final name."""

import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from .machine import CheckpointError
from .manifest import Ledger, find, home, sha256, weights_folder

Progress = Callable[[int, int | None], None]


def fetch(
    name: str, folder: Path | None = None, progress: Progress | None = None, ledger: Ledger | None = None
) -> Path:
    """Downloads a released checkpoint, or returns the copy that is there; compares size and SHA-256 either way.

    Args:
        name: of the manifest.
        folder: where it goes, the cache by default.
        progress: called with (bytes so far, bytes in all or None).

    Raises:
        CheckpointError: for an unknown name, an address that does not answer, another size or hash than known.
    """
    entry = find(name)
    ledger = ledger or Ledger()
    if entry.file:
        path = weights_folder() / entry.file
        ledger.compare(name, sha256(path))
        return path
    if not entry.url:
        raise CheckpointError(f"{name} has no address: its authors published none ({entry.note or 'see the manifest'})")
    folder = folder or home() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{_suffix(entry.url)}"
    if not path.exists():
        part = path.with_name(path.name + ".part")
        download(entry.url, part, progress)
        _check(entry, part, ledger)
        os.replace(part, path)
    else:
        _check(entry, path, ledger)
    return path


def _suffix(url: str) -> str:
    suffix = Path(url.split("?")[0]).suffix
    return suffix if suffix in (".pth", ".pt", ".bin", ".safetensors") else ".pth"


def _check(entry, path: Path, ledger: Ledger) -> None:
    size = path.stat().st_size
    if entry.size and size != entry.size:
        path.unlink() if path.name.endswith(".part") else None
        raise CheckpointError(f"{entry.name} has {size:,} bytes, {entry.size:,} are published: fetch it again")
    digest = sha256(path)
    try:
        if ledger.compare(entry.name, digest) == "new":
            ledger.record(entry.name, digest, size, "first download")
    except CheckpointError:
        if path.name.endswith(".part"):
            path.unlink()
        raise


def download(url: str, part: Path, progress: Progress | None = None, timeout: float = 30.0) -> None:
    """Fetches ``url`` into ``part``; goes on where an earlier attempt stopped, if the server can.

    Raises:
        CheckpointError: where the address does not answer, or the connection breaks; what came stays in ``part``.
    """
    if not url.startswith(("https://", "http://")):
        raise CheckpointError(f"{url[:80]} is not a web address")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "visionattn", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206
            have = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            if total is not None and total - have > shutil.disk_usage(part.parent).free:
                raise CheckpointError(
                    f"{total - have:,} bytes do not fit into {part.parent}: make room or pass a folder"
                )
            with part.open("ab" if resumed else "wb") as f:
                while chunk := response.read(1 << 18):
                    f.write(chunk)
                    have += len(chunk)
                    if progress is not None:
                        progress(have, total)
                f.flush()
                os.fsync(f.fileno())
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:
            return  # nothing is left to send; size and hash are compared next
        raise CheckpointError(f"{url} answers {e.code} {e.reason}: look whether its authors moved it") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as e:
        reason = getattr(e, "reason", None) or e
        raise CheckpointError(f"{url} broke off after {have:,} bytes ({reason}): run it again to go on") from None
    if total is not None and have != total:
        raise CheckpointError(f"{url} broke off after {have:,} of {total:,} bytes: run it again to go on")
