"""CLEAR's distillation of FLUX.1 (arXiv 2412.16112): ``python -m visionattn.diffusion.distill --config clear_flux``."""

from .cache import Cache, write_header, write_sample
from .cache import build as build_cache
from .config import Config, RunError, UserError, make
from .engine import Distiller
from .pair import Pair
from .sampling import Sampler, generate

__all__ = [
    "Cache",
    "Config",
    "Distiller",
    "Pair",
    "RunError",
    "Sampler",
    "UserError",
    "build_cache",
    "generate",
    "make",
    "write_header",
    "write_sample",
]
