"""The small models that come with trained weights: ``test_*.digits``.

Their files lie in ``weights/``. A pretrained cfg names one by :data:`SCHEME` and its file name, never by a path: a path
would be this computer's, and cfgs travel in pickles and saved models. :func:`resolve` finds the folder when a file is
read, beside the package in a checkout, inside of it in a wheel.
"""

import os
from pathlib import Path
from typing import Any

from timm.models import resolve_pretrained_cfg

SCHEME = "visionattn:"
TAG = "digits"
LABELS = tuple(str(digit) for digit in range(10))
_PACKAGE = Path(__file__).resolve().parents[1]


def weights_folder() -> Path:
    """``weights/``: at the top of a checkout, inside of the package in a wheel."""
    inside = _PACKAGE / "weights"
    return inside if inside.is_dir() else _PACKAGE.parent / "weights"


def resolve(file: str | os.PathLike) -> str | os.PathLike:
    """The path of a file that comes along, for ``visionattn:NAME``; anything else as it is.

    Raises:
        FileNotFoundError: for a name that does not come along.
    """
    if not isinstance(file, str) or not file.startswith(SCHEME):
        return file
    name = file.removeprefix(SCHEME)
    path = weights_folder() / name
    if Path(name).name != name or not path.is_file():
        raise FileNotFoundError(f"no weights called {name!r} come with visionattn: see 'visionattn weights list'")
    return path


def digits_cfgs(name: str, cfg: dict[str, Any], size: int, takes_size: bool = False) -> dict[str, dict[str, Any]]:
    """The two pretrained cfgs of a test model: untrained, which stays the default, and trained on the digits.

    Args:
        name: registered name of the model.
        cfg: its untrained cfg.
        size: pixels of a side that it was trained at.
        takes_size: whether the model is built for one size, ``img_size``.
    """
    digits = {
        **cfg,
        "file": f"{SCHEME}{name}.{TAG}.safetensors",
        "num_classes": len(LABELS),
        "input_size": (3, size, size),
        "fixed_input_size": takes_size or cfg.get("fixed_input_size", False),
        "pool_size": cfg.get("pool_size") and (max(1, size // 32),) * 2,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "license": "apache-2.0",
        "label_names": LABELS,
        "description": "Trained here on scikit-learn's handwritten digits; for tests and demonstrations",
    }
    # timm makes a tag with weights the default, unless a starred one follows
    return {f"{name}.{TAG}": digits, f"{name}.untrained*": cfg}


def tag_size(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``img_size`` of the tag that a model is built for, where it is fixed: it goes before the variant's own size.

    timm sets it only where a variant has no size of its own. ``kwargs`` are those of the registered function.
    """
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return {"img_size": cfg.input_size[-2:]} if cfg.fixed_input_size else {}
