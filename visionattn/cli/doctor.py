"""``doctor``: versions, the GPU, which backends run and why others do not, what each extra would add."""

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import Any

from .table import Facts

EXTRAS = {
    "diffusion": ("diffusers", "sparse attention in diffusers pipelines, DiT sampling"),
    "detection": ("mmdet", "backbones under mmdet detectors"),
    "natten": ("natten", "NATTEN's kernels as another backend of local attention"),
    "dev": ("pytest", "the tests"),
}


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser("doctor", parents=[common], help="versions, GPU, backends and extras of this computer")
    p.set_defaults(run=doctor)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def doctor(args: argparse.Namespace) -> Facts:
    import torch

    import visionattn

    facts: dict[str, Any] = {
        "visionattn": visionattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "triton": _version("triton") or "not installed: kernels cannot run",
        "GPU": _gpu(),
        "halo attention": _halo(),
    }
    for name, (package, adds) in EXTRAS.items():
        installed = importlib.util.find_spec(package) is not None
        facts[f"extra {name}"] = (
            f"installed ({package} {_version(package) or ''})".replace(" )", ")")
            if installed
            else f"not installed: pip install 'visionattn[{name}]' adds {adds}"
        )
    return Facts(facts)


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: eager references run, on the CPU"
    props = torch.cuda.get_device_properties(0)
    return f"{props.name}, {props.total_memory / 2**30:.0f} GiB, compute capability {props.major}.{props.minor}"


def _halo() -> str:
    import torch

    from visionattn.ops.halo import can_run_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(1, 8, 8, 1, 16, device=device, dtype=dtype)
    table = torch.zeros(27, 16, device=device, dtype=dtype)
    reason = can_run_triton(q, q, q, table, table, 8, 3)
    return "triton" if reason is None else f"reference; not triton: {reason}"
