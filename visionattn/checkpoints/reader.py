"""Reads a checkpoint that nobody vouches for: torch's zip files, its older format, and safetensors.

What comes back is made of dicts, lists, tuples, numbers, strings and tensors on the CPU. A file cannot run code, name a
class outside of a short list, or take more memory than its own size plus :class:`Limits` allow.
"""

import io
import json
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .machine import (
    DTYPE_NAMES,
    CheckpointError,
    CorruptCheckpoint,
    Inert,
    Machine,
    Name,
    StorageRef,
    TensorRef,
    UnsafeCheckpoint,
)

__all__ = ["CheckpointError", "CorruptCheckpoint", "Inert", "Limits", "UnsafeCheckpoint", "read_checkpoint"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_MEMBER = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


@dataclass(frozen=True)
class Limits:
    """What a file may cost.

    Args:
        file_bytes: largest file read.
        pickle_bytes: largest pickle inside of a zip file (tensors lie outside of it).
        operations: longest pickle.
        members: most files inside of a zip file.
        tensor_elements: most elements of a tensor that is larger than its storage (an expanded one).
        depth: deepest nesting of containers.
    """

    file_bytes: int = 64 << 30
    pickle_bytes: int = 256 << 20
    operations: int = 5_000_000
    members: int = 200_000
    tensor_elements: int = 1 << 20
    depth: int = 64


def read_checkpoint(path: str | os.PathLike, limits: Limits | None = None) -> Any:
    """The content of a checkpoint file, as data.

    Instances of :data:`visionattn.checkpoints.machine.RECORDS` are read as :class:`Inert` dicts; what else is not
    data is refused by name. Tensors come on the CPU, without gradients; what shared memory in the file does so here.

    Raises:
        FileNotFoundError: for a path that does not exist.
        UnsafeCheckpoint: for a file that asks for more than data, or is over a limit.
        CorruptCheckpoint: for one that is truncated, damaged, or no checkpoint.
    """
    path, limits = Path(path), limits or Limits()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path of a checkpoint")
    size = path.stat().st_size
    try:
        if size > limits.file_bytes:
            raise UnsafeCheckpoint(f"it is larger than {limits.file_bytes:,} bytes")
        if size < 8:
            raise CorruptCheckpoint(f"it has {size} bytes")
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            head = view[:16]
            if head[:4] == b"PK\x03\x04":
                return _read_zip(f, size, limits)
            if head[0] == 0x80 and head[1] <= 5:
                return _read_legacy(view, size, limits)
            if head[8:9] == b"{":
                return _read_safetensors(path, view, size, limits)
        raise CorruptCheckpoint("it is neither a torch file nor safetensors")
    except CheckpointError as e:
        raise type(e)(f"{path.name} is not read: {e}") from None


def _read_zip(f: BinaryIO, size: int, limits: Limits) -> Any:
    try:
        with zipfile.ZipFile(f) as archive:
            members = _members(archive, size, limits)
            roots = {name.partition("/")[0] for name in members if name.endswith("/data.pkl")}
            if len(roots) != 1 or f"{next(iter(roots))}/data.pkl" not in members:
                raise CorruptCheckpoint("it is a zip file, but not one that torch wrote")
            (root,) = roots
            order = members.get(f"{root}/byteorder")
            if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
                raise CorruptCheckpoint("its numbers are not little-endian")
            pickle = members[f"{root}/data.pkl"]
            if pickle.file_size > limits.pickle_bytes:
                raise UnsafeCheckpoint(f"its pickle is larger than {limits.pickle_bytes:,} bytes")
            machine = Machine(limits.operations)
            content = machine.run(archive.read(pickle))

            def load(ref: StorageRef) -> bytes:
                member = members.get(f"{root}/data/{ref.key}")
                if member is None:
                    raise CorruptCheckpoint(f"storage {ref.key!r} is missing")
                return archive.read(member)

            return _Builder(load, limits).build(content)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, struct.error) as e:
        raise CorruptCheckpoint(f"its zip archive is damaged ({str(e)[:100]})") from None
    except (RuntimeError, ValueError, KeyError, OverflowError, UnicodeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CorruptCheckpoint(f"its zip archive makes no sense ({str(e)[:100]})") from None


def _members(archive: zipfile.ZipFile, size: int, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > limits.members:
        raise UnsafeCheckpoint(f"it holds more than {limits.members:,} files")
    total = 0
    members = {}
    for info in infos:
        name = info.filename
        if not _MEMBER.fullmatch(name) or ".." in name.split("/"):
            raise UnsafeCheckpoint(f"it holds a file called {name[:60]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnsafeCheckpoint(f"its member {name[:60]!r} is compressed: torch stores plainly")
        if name in members:
            raise CorruptCheckpoint(f"it holds {name[:60]!r} twice")
        members[name] = info
        total += info.file_size
    if total > size:  # overlapping members
        raise UnsafeCheckpoint("its members are larger than the file")
    return members


def _read_legacy(view: mmap.mmap, size: int, limits: Limits) -> Any:
    """torch's format before 1.6: three small pickles, the content's, the storages' keys, then the storages."""
    machine = Machine(limits.operations)
    if machine.run(view) != _LEGACY_MAGIC:
        raise CorruptCheckpoint("it is a bare pickle, not a file that torch wrote: re-save it with torch.save")
    machine.run(view)
    info = machine.run(view)
    if not isinstance(info, dict) or info.get("little_endian") is not True:
        raise CorruptCheckpoint("its numbers are not little-endian")
    content = machine.run(view)
    refs = dict(machine.persistent)
    keys = machine.run(view)
    if not isinstance(keys, list) or len(keys) > limits.members:
        raise CorruptCheckpoint("its list of storages makes no sense")
    storages = {}
    for key in keys:
        if not isinstance(key, str) or key not in refs or key in storages:
            raise CorruptCheckpoint("its list of storages makes no sense")
        count = refs[key].numel
        header = view.read(8)
        width = _storage_dtype(refs[key], None).itemsize
        if len(header) != 8 or struct.unpack("<q", header)[0] != count or count * width > size - view.tell():
            raise CorruptCheckpoint(f"storage {key!r} is truncated")
        storages[key] = view.read(count * width)

    def load(ref: StorageRef) -> bytes:
        if ref.key not in storages:
            raise CorruptCheckpoint(f"storage {ref.key!r} is missing")
        return storages[ref.key]

    return _Builder(load, limits).build(content)


def _read_safetensors(path: Path, view: mmap.mmap, size: int, limits: Limits) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    (header,) = struct.unpack("<Q", view[:8])
    if header > min(size - 8, limits.pickle_bytes):
        raise CorruptCheckpoint("its header is truncated")
    try:
        json.loads(view[8 : 8 + header].decode())
        return load_file(path)
    except (SafetensorError, ValueError, RecursionError, RuntimeError, KeyError) as e:
        raise CorruptCheckpoint(f"its safetensors header is damaged ({str(e)[:100]})") from None


def _storage_dtype(ref: StorageRef, dtype: str | None) -> torch.dtype:
    if dtype is not None:
        name = dtype.rpartition(".")[2]
        if name not in DTYPE_NAMES:
            raise UnsafeCheckpoint(f"a tensor is of {dtype[:60]!r}: give plain numbers")
        return getattr(torch, name)
    if ref.storage_type not in _STORAGES:
        raise UnsafeCheckpoint(f"a tensor is kept as {ref.storage_type[:60]!r}: give plain numbers")
    return _STORAGES[ref.storage_type]


class _Builder:
    """Replaces the machine's descriptions by tensors, each storage read once."""

    def __init__(self, load: Callable[[StorageRef], bytes], limits: Limits):
        self.load = load
        self.limits = limits
        self.bytes: dict[str, bytearray] = {}
        self.done: dict[int, Any] = {}
        self.kept: list[Any] = []  # ids stay those of living objects

    def build(self, value: Any, depth: int = 0) -> Any:
        if depth > self.limits.depth:
            raise UnsafeCheckpoint(f"it nests deeper than {self.limits.depth} levels, or holds itself")
        if value is None or isinstance(value, str | int | float | bytes):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        result: Any
        if isinstance(value, TensorRef):
            result = self.tensor(value)
        elif isinstance(value, dict):
            result = Inert() if isinstance(value, Inert) else {}
            result.update((key, self.build(item, depth + 1)) for key, item in value.items())
            if isinstance(value, Inert):
                result.kind = value.kind
        elif isinstance(value, list):
            result = [self.build(item, depth + 1) for item in value]
        elif isinstance(value, tuple):
            result = tuple(self.build(item, depth + 1) for item in value)
        elif isinstance(value, Name):
            result = value.path  # a dtype or a class, kept as its name
        else:
            raise CorruptCheckpoint(f"it holds a {type(value).__name__} outside of a tensor")
        self.done[id(value)] = result
        self.kept.append(value)
        return result

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        dtype = _storage_dtype(ref.storage, ref.dtype)
        if ref.storage.key not in self.bytes:
            self.bytes[ref.storage.key] = bytearray(self.load(ref.storage))
        data = self.bytes[ref.storage.key]
        width = 1 if ref.dtype is not None else dtype.itemsize  # v3 counts an untyped storage, in bytes
        if len(data) != ref.storage.numel * width:
            raise CorruptCheckpoint(
                f"storage {ref.storage.key!r} has {len(data)} bytes, not {ref.storage.numel * width}"
            )
        available = len(data) // dtype.itemsize
        count = 1
        for extent in ref.size:
            count *= extent
        last = ref.offset + sum((n - 1) * s for n, s in zip(ref.size, ref.stride, strict=True))
        if count > 0 and last >= available:
            raise CorruptCheckpoint(f"a tensor of shape {list(ref.size)[:8]} is larger than its storage")
        if count > max(available, self.limits.tensor_elements):
            raise UnsafeCheckpoint(f"a tensor of shape {list(ref.size)[:8]} is expanded over the limit")
        if count == 0 or available == 0:
            if max(ref.size, default=0) > 2**40:
                raise CorruptCheckpoint(f"an empty tensor has shape {list(ref.size)[:8]}")
            return torch.empty(ref.size, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype, count=available)
        return flat.as_strided(ref.size, ref.stride, ref.offset)


def read_bytes(data: bytes, limits: Limits | None = None) -> Any:
    """A zip checkpoint held in memory; see :func:`read_checkpoint`."""
    return _read_zip(io.BytesIO(data), len(data), limits or Limits())
