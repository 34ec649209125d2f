"""The list of released checkpoints (``weights/manifest.yaml``), and the hashes seen on this computer.

The authors publish no hashes. So the first download of a file is recorded in a ledger of the user's, and every later
one is compared with it; a hash in the manifest goes before the ledger.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from visionattn._files import atomic_write
from visionattn.models._shipped import weights_folder

from .machine import CheckpointError


@dataclass(frozen=True)
class Released:
    """One published file.

    Args:
        name: what it is called here, ``model.tag``.
        system: agent, inline, mala, ...
        model: registered name of the network that it fits (None where the zoo has none yet).
        url: address as published, or None; ``file`` is the path below ``weights/`` of a file that comes along.
        wrapper: the key that the weights lie under, None for a plain state dict or where it was not seen.
        licence: what the source says of the weights.
        top1: accuracy in percent on ``dataset``, published or, for a file that comes along, measured here; None where
            the result is another.
        dataset: what ``top1`` was measured on.
        img_size: pixels of the published evaluation.
        sha256, size: hash and bytes, where known.
        recipe: the command that trained a file that comes along.
    """

    name: str
    system: str
    model: str | None = None
    url: str | None = None
    file: str | None = None
    wrapper: str | None = None
    licence: str = "not stated"
    top1: float | None = None
    dataset: str = "imagenet-1k"
    img_size: int | None = None
    sha256: str | None = None
    size: int | None = None
    recipe: str | None = None
    note: str | None = None


def manifest() -> dict[str, Released]:
    """Every released checkpoint by name.

    Raises:
        CheckpointError: for a manifest with an unknown field or a name twice.
    """
    known = {f.name for f in fields(Released)}
    entries: dict[str, Released] = {}
    for row in yaml.safe_load((weights_folder() / "manifest.yaml").read_text())["checkpoints"]:
        strange = set(row) - known
        if strange or row["name"] in entries:
            raise CheckpointError(f"manifest entry {row['name']!r} is doubled or has unknown fields {sorted(strange)}")
        entries[row["name"]] = Released(**row)
    return entries


def find(name: str) -> Released:
    """The entry called ``name``; CheckpointError with the nearest name for one that is not there."""
    entries = manifest()
    if name in entries:
        return entries[name]
    near = get_close_matches(name, entries, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "'visionattn weights list' shows all"
    raise CheckpointError(f"no released checkpoint is called {name!r}: {hint}")


def sha256(path: Path, progress: Callable[[int], Any] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; ``progress`` is told of every chunk's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def home() -> Path:
    """Where downloads and the ledger lie: ``$VISIONATTN_HOME``, else the user's cache folder."""
    if os.environ.get("VISIONATTN_HOME"):
        return Path(os.environ["VISIONATTN_HOME"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionattn"


class Ledger:
    """Hashes seen on this computer, by the checkpoint's name; a JSON file, replaced as a whole."""

    def __init__(self, path: Path | None = None):
        self.path = path or home() / "ledger.json"

    def read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            return dict(json.loads(self.path.read_text()))
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{self.path} is damaged ({e}): delete it to begin anew") from None

    def record(self, name: str, digest: str, size: int, how: str) -> None:
        """Keeps the hash under ``name``, in place of any other."""
        content = {**self.read(), name: {"sha256": digest, "size": size, "how": how}}
        atomic_write(self.path, json.dumps(content, indent=1, sort_keys=True))

    def compare(self, name: str, digest: str) -> str:
        """``'manifest'`` or ``'recorded'``: what the hash agrees with; ``'new'`` if nothing is known.

        Raises:
            CheckpointError: where it differs.
        """
        entry = manifest().get(name)
        if entry is not None and entry.sha256:
            known, source = entry.sha256, "manifest"
        else:
            known, source = self.read().get(name, {}).get("sha256"), "recorded"
        if known is None:
            return "new"
        if known != digest:
            raise CheckpointError(
                f"{name} has SHA-256 {digest[:16]}..., but {known[:16]}... is {source}: it changed or is damaged; "
                "'visionattn weights trust FILE --name NAME' accepts it if you know why"
            )
        return source
