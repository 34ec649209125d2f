"""``doctor``: versions, the GPU, which backends run and why others do not, what each extra would add."""

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import Any

from .table import Facts

# module that an extra brings, distributions it may come from, what it adds
EXTRAS = {
    "diffusion": ("diffusers", ("diffusers",), "sparse attention in diffusers pipelines, DiT sampling"),
    "detection": ("mmdet", ("onedl-mmdetection", "mmdet"), "backbones under mmdet detectors"),
    "natten": ("natten", ("natten",), "NATTEN's kernels as another backend of local attention"),
    "graph": ("skimage", ("scikit-image",), "superpixel graphs, similarity of pictures"),
    "dev": ("pytest", ("pytest",), "the tests"),
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
    }
    facts |= {name: _state(reason) for name, reason in _kernels().items()}
    for name, (module, distributions, adds) in EXTRAS.items():
        facts[f"extra {name}"] = f"not installed: pip install 'visionattn[{name}]' adds {adds}"
        if importlib.util.find_spec(module) is not None:
            found = next((f"{d} {_version(d)}" for d in distributions if _version(d)), module)
            facts[f"extra {name}"] = f"installed ({found})"
    if importlib.util.find_spec("mmcv") is not None:
        compiled = importlib.util.find_spec("mmcv._ext") is not None
        facts["mmcv's operators"] = "compiled" if compiled else "from torchvision's kernels (docs/mmcv-ops.md)"
    return Facts(facts)


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: eager references run, on the CPU"
    props = torch.cuda.get_device_properties(0)
    return f"{props.name}, {props.total_memory / 2**30:.0f} GiB, compute capability {props.major}.{props.minor}"


def _state(reason: str | None) -> str:
    return "triton" if reason is None else f"reference; not triton: {reason}"


def _kernels() -> dict[str, str | None]:
    """For each operator with kernels, why a usual call here does not get them from ``backend='auto'``, or None."""
    import torch

    from visionattn.ops import halo, local, moh
    from visionattn.ops.aggregated import api as aggregated
    from visionattn.ops.graph.api import can_run_triton as graph_runs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    q, table = zeros(1, 8, 8, 1, 16), zeros(27, 16)
    tokens, gates = zeros(1, 64, 1, 64), zeros(1, 64, 1)
    with torch.no_grad():
        routed = moh.can_run_triton(tokens, tokens, tokens, gates)
    found = local.explain(tokens, tokens, tokens, (8, 8), local.Neighborhood(5))
    waiting = None if device == "cpu" else "'auto' waits for its tests to pass on a GPU; backend='triton' asks for it"
    graph_ok, graph_reason = graph_runs(zeros(16, 1, 16))
    cpu = "the kernels run on CUDA" if device == "cpu" else None
    return {
        "halo attention": halo.can_run_triton(q, q, q, table, table, 8, 3),
        "local attention": found.unavailable.get("triton"),
        "mixture of heads": routed,
        "aggregated attention": aggregated.can_run_triton(tokens),
        "graph attention": None if graph_ok else graph_reason,
        "InLine attention": cpu or waiting,
        "depthwise residual": cpu or waiting,
    }
