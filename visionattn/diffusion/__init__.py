"""Sparse attention inside diffusers' pipelines: one line on, one line off. Needs the extra ``diffusion``."""

try:
    import diffusers  # noqa: F401
except ImportError as e:
    from visionattn._extras import missing_extra

    raise missing_extra(
        "visionattn.diffusion needs diffusers: pip install 'visionattn[diffusion]' (in a checkout: pip install -e "
        "'.[diffusion]')"
    ) from e

from visionattn.ops.local.patterns import Cross, Disk, Neighborhood

from . import adapters_moh  # noqa: F401  registers itself
from .adapters import Adapter, Site, register_adapter
from .agent_sd_patch import agent_sd
from .clear import load_clear, rope_factor, upscale_generate
from .layout import GridError, Layout
from .patch import Handle, sparsify
from .presets import PRESETS
from .report import Report

__all__ = [
    "PRESETS",
    "Adapter",
    "Cross",
    "Disk",
    "GridError",
    "Handle",
    "Layout",
    "Neighborhood",
    "Report",
    "Site",
    "agent_sd",
    "load_clear",
    "register_adapter",
    "rope_factor",
    "sparsify",
    "upscale_generate",
]
