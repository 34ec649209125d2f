"""How fast the kernels were: TFLOP/s that they executed on an H100 in bfloat16, for choosing and predicting only.

From benchmarks/results/local_attention-*.csv (24 heads of 128 channels); docs/local.md says how to measure. A rate of
tiles under a mask is what is left of a row's time after its tiles without masks took theirs.
"""

import math
from dataclasses import dataclass

import torch

from .call import Call
from .counts import visits
from .patterns import Disk, Neighborhood

# Other backends: milliseconds are pairs over these
OTHERS = {"dense": 600.0, "flex": 290.0, "masked sdpa": 100.0, "natten": 530.0, "natten, masked": 310.0}
# What a layer takes the host in eager mode at least, on a busy machine: 0.4 to 1.3 ms were seen at 64 x 64
HOST_MS = 0.9
# Least share of visited tiles without masks for which the Gluon kernel is faster (gluon.FULL)
GLUON_FULL = 0.6
# Largest disk that the Gluon kernel is taken for
GLUON_RADIUS = 32
# Least number of queries of a disk, of all heads, that it is taken for: 16 tiles for each of 132 multiprocessors
GLUON_QUERIES = 16 * 128 * 132


@dataclass(frozen=True)
class Kernel:
    """A kernel: TFLOP/s on tiles without and with masks, milliseconds that a launch takes besides (first loads,
    half-empty last waves), and its tiles of queries and keys (z, y, x)."""

    name: str
    full: float
    masked: float
    overhead_ms: float
    tiles: tuple = ((1, 1, 128), (1, 1, 128))

    def ms(self, gflop: float, masked: float = 0.0) -> float:
        return (gflop - masked) / self.full + masked / self.masked + self.overhead_ms


_WINDOW, _VIDEO, _DISK = ((1, 8, 16),) * 2, ((2, 8, 8),) * 2, ((1, 8, 8),) * 2
GRID = {
    "gluon": Kernel("gluon", 576, 449, 0.07, _WINDOW),
    "gluon, 3-D": Kernel("gluon", 603, 449, 0.07, _VIDEO),
    "triton": Kernel("triton", 469, 400, 0.07, _WINDOW),
    "triton, 3-D": Kernel("triton", 475, 400, 0.07, _VIDEO),
    "triton, 1-D": Kernel("triton", 469, 400, 0.07),
    "triton, disk": Kernel("triton", 460, 345, 0.07, _DISK),
    "gluon, disk": Kernel("gluon", 462, 462, 0.07, _DISK),
}
# 512 rows of text on 4,608 to 262,656 keys
TEXT = {"cudnn": Kernel("cudnn", 510, 510, 0.02), "triton": Kernel("triton", 414, 414, 0.065)}


def kernel_of(call: Call, device: str | None = None, plan=None) -> Kernel:
    """The kernel that runs the rows of grid queries.

    Args:
        call: its tensors may be on the meta device.
        device: the GPU that would run it; without it an H100 with triton 3.6.
        plan: the call's :class:`~visionattn.ops.local.fused.Plan`, which knows.
    """
    axes = len(call.grid)
    disk = isinstance(call.pattern, Disk)
    if axes == 1 and not disk:
        return GRID["triton, 1-D"]
    three = axes == 3 and call.grid[0] > 1
    takes = _takes_gluon(call, three, device) if plan is None else plan.gluon is not None
    name = "gluon" if takes else "triton"
    return GRID[f"{name}, disk" if disk else f"{name}, 3-D" if three else name]


def _takes_gluon(call: Call, three: bool, device: str | None) -> bool:
    if device is not None and not _gluon_runs(device):
        return False
    if not isinstance(call.pattern, (Neighborhood, Disk)) or call.q.shape[3] != 128 or call.q.element_size() != 2:
        return False
    if call.extra or call.bias is not None or (call.text and call.text_lengths is not None):
        return False
    if isinstance(call.pattern, Disk):
        queries = math.prod(call.grid) * call.q.shape[0] * call.q.shape[2]
        return len(call.grid) == 2 and call.pattern.radius <= GLUON_RADIUS and queries >= GLUON_QUERIES
    if any(axis.dilation > 1 for axis in call.pattern.axes(call.grid)):
        return False
    visited, full = visits(call.pattern, call.grid, *(_VIDEO if three else _WINDOW))
    return full >= GLUON_FULL * visited


def _gluon_runs(device: str) -> bool:
    import triton

    from . import fused, gluon

    if gluon.failed or fused.forward_choice == "triton" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return triton.__version__.startswith(gluon.MEASURED) and gluon.cannot_build_gluon(gluon.KERNELS) is None


def text_rows_of(call: Call, device: str | None = None, plan=None) -> Kernel:
    """What computes the rows of text queries, likewise."""
    if plan is not None:
        return TEXT["triton" if plan.text_chunks is None else "cudnn"]
    from . import text

    capability = 90
    if device is not None:
        major, minor = torch.cuda.get_device_capability(device)
        off = text.failed or text.choice == "triton" or torch.are_deterministic_algorithms_enabled()
        capability = 0 if off or not torch.backends.cuda.cudnn_sdp_enabled() else 10 * major + minor
    plain = call.text_lengths is None and call.q.element_size() == 2
    return TEXT["cudnn" if plain and text.takes(capability, call.text, call.q.shape[3]) else "triton"]
