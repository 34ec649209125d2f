"""Mutated checkpoint files against the reader: `python -m tests.checkpoints.fuzz --files 100000`.

Every file is derived from a seed. A file counts as survived if it is read, or refused with a CheckpointError; anything
else (another exception, code that runs, a file opened outside of the work folder, memory over the bound, a dead
interpreter) fails the run and keeps the file.
"""

import argparse
import codecs
import io
import pickle
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy  # noqa: F401  the reader imports it late
import torch

from visionattn.checkpoints import CheckpointError, Limits, read_checkpoint

LIMITS = Limits(file_bytes=1 << 26, pickle_bytes=1 << 20, operations=100_000, members=1000)
# what code that a file smuggled in would have to do
FORBIDDEN = ("os.", "subprocess.", "exec", "compile", "socket.", "shutil.", "ctypes.", "pty.", "webbrowser.")
MEMORY_MIB = 256
PAYLOADS = (b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ctorch.hub\nload\n", b"cos\npopen\n", b"cbuiltins\ngetattr\n")


def seeds() -> list[bytes]:
    """Small real files, one of each format and wrapper."""
    torch.manual_seed(0)
    weights = {f"blocks.{i}.weight": torch.randn(3, 4) for i in range(3)}
    content = {
        "model": weights,
        "args": argparse.Namespace(lr=0.1, sizes=[1, 2]),
        "epoch": 3,
        "half": torch.ones(5).half(),
    }
    files = []
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    from safetensors.torch import save

    files.append(save(weights))
    return files


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A kind of mutation and the mutated file."""
    kind = rng.choice(sorted(MUTATIONS))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = MUTATIONS[kind](data, rng)
    return kind, data


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _splice(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    c = rng.randrange(len(data) + 1)
    return data[:c] + data[a:b] + data[c:] if rng.random() < 0.5 else data[:a] + data[b:]


def _edit_pickle(data: bytes, rng: random.Random, edit) -> bytes:
    """Applies `edit` to the pickle inside of a zip file, with sizes and checksums made right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
                for name in old.namelist():
                    body = old.read(name)
                    new.writestr(name, edit(body) if name.endswith("data.pkl") else body)
            return out.getvalue()
    except Exception:
        return edit(data)


def _pickle_flip(data: bytes, rng: random.Random) -> bytes:
    return _edit_pickle(data, rng, lambda body: _flip(body, rng))


def _pickle_splice(data: bytes, rng: random.Random) -> bytes:
    return _edit_pickle(data, rng, lambda body: _splice(body, rng))


def _payload(data: bytes, rng: random.Random) -> bytes:
    call = rng.choice(PAYLOADS) + b"X\x09\x00\x00\x00touch /xx\x85R0"

    def edit(body: bytes) -> bytes:
        at = rng.choice((2, rng.randrange(len(body) + 1)))
        return body[:at] + call + body[at:]

    return _edit_pickle(data, rng, edit)


def _numbers(data: bytes, rng: random.Random) -> bytes:
    """Small integers of the pickle (sizes, strides, offsets, lengths) become huge ones."""
    big = rng.choice((b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"J\xff\xff\xff\xff", b"M\xff\xff"))

    def edit(body: bytes) -> bytes:
        places = [i for i in range(len(body) - 1) if body[i : i + 1] == b"K"]
        if not places:
            return _flip(body, rng)
        for at in rng.sample(places, min(len(places), rng.choice((1, 2)))):
            body = body[:at] + big + body[at + 2 :]
        return body

    return _edit_pickle(data, rng, edit)


def _bomb(data: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    kind = rng.choice(("deflate", "nested", "memo", "laughs", "tuple key", "frame", "copies"))
    if kind == "deflate":
        body = b"\x80\x02" + b"0" * rng.choice((1 << 20, 1 << 23))
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("archive/data.pkl", body)
        return out.getvalue()
    depth = rng.choice((100, 1000, 20_000))
    body = {
        "nested": b"]" * depth + b"a" * (depth - 1),
        "memo": b"}r" + struct.pack("<I", rng.choice((2**31, 2**32 - 1))),
        "laughs": b"]q\x00" + b"](h\x00h\x00h\x00h\x00eq\x00" * 2000,
        "tuple key": b"}N" + b"\x85" * depth + b"K\x01s",
        "frame": b"\x95" + struct.pack("<Q", 2**62) + b"}",
        "copies": b"](" + b"K\x01" * 20_000 + b"eq\x01" + b"cbuiltins\nset\nh\x01\x85R" * 10_000,
    }[kind]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
    return out.getvalue()


def _paths(data: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    name = rng.choice(("../data.pkl", "/etc/data.pkl", "a/../../data.pkl", "a//data.pkl", "a\\data.pkl", "ä/data.pkl"))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        z.writestr(name, pickle.dumps({}, 2))
        if rng.random() < 0.5:
            z.writestr("archive/data.pkl", pickle.dumps({}, 2))
    return out.getvalue()


def _header(data: bytes, rng: random.Random) -> bytes:
    """The first eight bytes: safetensors keeps its header's length there."""
    return struct.pack("<Q", rng.choice((0, 1, 2**20, 2**40, 2**63, rng.randrange(len(data) + 9)))) + data[8:]


MUTATIONS = {
    "truncate": _truncate, "flip": _flip, "splice": _splice, "pickle flip": _pickle_flip,
    "pickle splice": _pickle_splice,
    "payload": _payload, "numbers": _numbers, "bomb": _bomb, "paths": _paths, "header": _header,
}  # fmt: skip


def run(first: int, count: int, folder: Path) -> Counter:
    """Reads `count` mutated files; raises AssertionError for the first that does harm."""
    base = seeds()
    path = folder / "case.pth"
    read_seeds(base, path)  # also brings the lazy imports, before the hook sees them
    for name in ("cp437", "raw_unicode_escape", "unicode_escape", "latin_1", "ascii", "utf_8"):  # zipfile, pickletools
        codecs.lookup(name)
    events: list[str] = []
    watching = [False]

    def hook(event: str, args: tuple) -> None:
        if watching[0] and event.startswith(FORBIDDEN):
            events.append(event)
        if watching[0] and event == "open" and isinstance(args[0], str) and not args[0].startswith(str(folder)):
            events.append(f"open {args[0]}")

    sys.addaudithook(hook)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter = Counter()
    for number in range(first, first + count):
        rng = random.Random(number)
        kind, data = mutate(rng.choice(base), rng)
        path.write_bytes(data)
        watching[0] = True
        try:
            read_checkpoint(path, LIMITS)
            outcome = "read"
        except CheckpointError as e:
            outcome = type(e).__name__
        finally:
            watching[0] = False
        assert not events, f"file {number} ({kind}) caused {events[:3]}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < MEMORY_MIB, f"file {number} ({kind}) took {grown:.0f} MiB"
        outcomes[outcome] += 1
        outcomes[f"{kind}: {outcome}"] += 1
    return outcomes


def read_seeds(base: list[bytes], path: Path) -> None:
    """The unmutated files are read; else nothing below would mean anything."""
    for data in base:
        path.write_bytes(data)
        assert read_checkpoint(path, LIMITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10_000, help="files per process; a dead process loses one batch")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run(args.first, args.files, Path(folder))
        print("\n".join(f"{n}\t{k}" for k, n in sorted(outcomes.items())))
        return
    total: Counter = Counter()
    start = time.time()
    for first in range(args.first, args.first + args.files, args.batch):
        count = min(args.batch, args.first + args.files - first)
        command = [sys.executable, "-m", "tests.checkpoints.fuzz", "--worker", f"--first={first}", f"--files={count}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"files {first} to {first + count - 1}: exit {done.returncode}\n{done.stderr[-2000:]}")
        for line in done.stdout.splitlines():
            n, _, key = line.partition("\t")
            total[key] += int(n)
        print(f"{first + count - args.first:>8} files, {time.time() - start:.0f} s", flush=True)
    print("\n".join(f"{n:>8}  {k}" for k, n in sorted(total.items())))


if __name__ == "__main__":
    main()
