"""Settings with a name. Each says whose quality measurement it rests on, or that there is none."""

from typing import Any

from visionattn.ops.local.patterns import Disk, Neighborhood, Pattern

_NATTEN = "GNA's paper (arXiv 2504.16922) ran FLUX.1-dev at 4096 px with this window and 9 dense steps; no number here"
_CLEAR = (
    "CLEAR (arXiv 2412.16112, table 1) measured it on FLUX.1-dev at 1024 px with its distilled projections; without "
    "them expect less"
)
_NONE = "no quality measurement of this model with this pattern is known"

# name: by model class, or '*': pattern, further settings, whose measurement
PRESETS: dict[str, dict[str, tuple[Pattern, dict[str, Any], str]]] = {
    "quality": {
        "FluxTransformer2DModel": (Disk(32), {}, _CLEAR),
        "HunyuanVideoTransformer3DModel": (Neighborhood((30, 40, 40), (1, 8, 8)), {"dense_steps": 15}, _NONE),
        "*": (Disk(32), {"dense_steps": 4}, _NONE),
    },
    "balanced": {
        "FluxTransformer2DModel": (Neighborhood(80, stride=16), {"dense_steps": 9}, _NATTEN),
        "HunyuanVideoTransformer3DModel": (Neighborhood((18, 24, 24), (2, 8, 8)), {"dense_steps": 15}, _NONE),
        "*": (Disk(16), {"dense_steps": 4}, _NONE),
    },
    "fast": {
        "FluxTransformer2DModel": (Disk(8), {}, _CLEAR),
        "*": (Disk(8), {"dense_steps": 2}, _NONE),
    },
}


def preset(name: str, model: str) -> tuple[Pattern, dict[str, Any], str]:
    """Pattern, further settings and provenance of a preset for a model class.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: there are {', '.join(PRESETS)}")
    by_model = PRESETS[name]
    return by_model.get(model, by_model["*"])
