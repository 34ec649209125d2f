"""``weights list | fetch | verify | convert | trust``."""

import argparse
import fnmatch
import sys
from pathlib import Path
from typing import Any

from .table import Facts, Table


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser("weights", help="released checkpoints: list, fetch, verify, convert, trust")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    a = actions.add_parser("list", parents=[common], help="every released checkpoint that is known")
    a.add_argument("pattern", nargs="?", default="*")
    a.add_argument("--markdown", action="store_true", help="the table of docs/weights.md")
    a.set_defaults(run=list_weights)
    a = actions.add_parser("fetch", parents=[common], help="download, or go on with a download; size and hash compared")
    a.add_argument("name")
    a.add_argument("--folder", type=Path, help="where it goes; the cache by default")
    a.set_defaults(run=fetch)
    a = actions.add_parser("verify", parents=[common], help="read a file without trust, hash it, compare what is known")
    a.add_argument("file", type=Path)
    a.add_argument("--name", help="the released checkpoint that it should be")
    a.set_defaults(run=verify)
    a = actions.add_parser("convert", parents=[common], help="an authors' file as safetensors that timm reads")
    a.add_argument("file", type=Path)
    a.add_argument("--to", required=True, metavar="MODEL", help="registered name of the model")
    a.add_argument("--out", type=Path, help="a folder, or x.safetensors; only reported otherwise")
    a.add_argument("--num-classes", type=int)
    a.add_argument("--not-strict", action="store_true", help="let names be missing or left over")
    a.set_defaults(run=convert)
    a = actions.add_parser("trust", parents=[common], help="record a file's hash as the right one of its name")
    a.add_argument("file", type=Path)
    a.add_argument("--name", help="the file's name without suffix by default")
    a.set_defaults(run=trust)


def list_weights(args: argparse.Namespace) -> Table | str:
    from visionattn.checkpoints import Ledger, manifest

    entries = [e for e in manifest().values() if fnmatch.fnmatchcase(e.name, args.pattern)]
    if not entries:
        raise ValueError(f"no released checkpoint matches {args.pattern!r}: 'visionattn weights list' shows all")
    if args.markdown:
        return as_markdown(entries)
    seen = Ledger().read()
    rows = []
    for e in entries:
        known = "manifest" if e.sha256 else "recorded" if e.name in seen else None
        top1 = None if e.top1 is None else f"{e.top1} ({e.dataset})"
        rows.append((e.name, top1, e.img_size, e.size, known, e.licence, e.file or e.url or e.note))
    return Table(("name", "top1", "img_size", "bytes", "hash", "licence", "from"), rows)


def as_markdown(entries: list[Any]) -> str:
    """Two tables of manifest entries: what comes along, and what others published."""
    own = [e for e in entries if e.file]
    others = [e for e in entries if not e.file]
    lines = []
    if own:
        lines += ["| comes along | top-1 on the digits, % | px | bytes | SHA-256 |", "|---|---|---|---|---|"]
        lines += [f"| `{e.name}` | {e.top1} | {e.img_size} | {e.size:,} | `{e.sha256[:16]}` |" for e in own]
    if own and others:
        lines.append("")
    if others:
        lines += ["| published elsewhere | top-1, % | px | licence | from |", "|---|---|---|---|---|"]
        for e in others:
            top1, size = e.top1 or "-", e.img_size or "-"
            where = "; ".join(part for part in (e.url and f"[file]({e.url})", e.note) if part)
            lines.append(f"| `{e.name}` | {top1} | {size} | {e.licence} | {where} |")
    return "\n".join(lines)


def fetch(args: argparse.Namespace) -> Facts:
    from visionattn import checkpoints

    path = checkpoints.fetch(args.name, args.folder, _progress if sys.stderr.isatty() else None)
    return Facts({"file": str(path), "sha256": checkpoints.sha256(path), "bytes": path.stat().st_size})


def _progress(have: int, total: int | None) -> None:
    share = f" of {total / 2**20:.1f} MiB ({100 * have / total:.0f} %)" if total else " MiB"
    print(f"\r{have / 2**20:.1f}{share}", end="\n" if have == total else "", file=sys.stderr, flush=True)


def verify(args: argparse.Namespace) -> Facts:
    import torch

    from visionattn.checkpoints import Ledger, find, manifest, read_checkpoint, sha256
    from visionattn.models._checkpoint import unwrap_state_dict

    content = read_checkpoint(args.file)
    digest = sha256(args.file)
    name = find(args.name).name if args.name else args.file.stem
    agrees = Ledger().compare(name, digest) if args.name or name in manifest() else "not compared: pass --name"
    weights = unwrap_state_dict(content) if isinstance(content, dict) else {}
    tensors = [v for v in weights.values() if isinstance(v, torch.Tensor)]
    return Facts(
        {
            "file": str(args.file),
            "bytes": args.file.stat().st_size,
            "sha256": digest,
            "hash": {"new": "not known yet", "manifest": "as the manifest says", "recorded": "as recorded"}.get(
                agrees, agrees
            ),
            "keys": [str(k) for k in content][:12] if isinstance(content, dict) else type(content).__name__,
            "tensors": len(tensors),
            "elements": sum(t.numel() for t in tensors),
            "not finite": sum(not bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()),
        }
    )


def convert(args: argparse.Namespace) -> Any:
    from visionattn import checkpoints

    from .models import check_name

    extra = {"num_classes": args.num_classes} if args.num_classes is not None else {}
    return checkpoints.convert(args.file, check_name(args.to), args.out, not args.not_strict, **extra)


def trust(args: argparse.Namespace) -> Facts:
    from visionattn.checkpoints import Ledger, find, read_checkpoint, sha256

    read_checkpoint(args.file)  # what cannot be read safely is not trusted by a hash either
    name = find(args.name).name if args.name else args.file.stem
    digest = sha256(args.file)
    Ledger().record(name, digest, args.file.stat().st_size, "trusted by the user")
    return Facts({"name": name, "sha256": digest, "recorded in": str(Ledger().path)})
