"""The operators of ``mmcv._ext`` where mmcv was installed without its compiled extension.

mmdet imports all of ``mmcv.ops``, which needs the compiled module ``mmcv._ext``; a plain ``pip install`` of mmcv does
not build it for today's torch. :func:`ensure_mmcv_ops` puts a module in its place that computes what detectors need
with torchvision's kernels (CPU and CUDA). Signatures, in-place outputs and return values are those of mmcv's binding.
An operator that is not here raises one line when it is called. A compiled mmcv is left alone.
"""

import functools
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from .late import repeat_failed_imports

BUILD_HINT = (
    "MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps --no-binary :all: "
)

__all__ = ["build_hint", "ensure_mmcv_ops"]


class _Extension(ModuleType):
    """The module: names the operators that it has, and answers for every other one with a function that raises."""

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")
        return functools.partial(_missing, name)


class _Loader:
    """Fills the substitute; a module needs a loader for ``find_spec('mmcv._ext')``, by which mmcv looks for it."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _Extension(spec.name, __doc__)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        from . import deform, focal, nms, roi

        for source in (deform, focal, nms, roi):
            module.__dict__.update({name: getattr(source, name) for name in source.__all__})
        module.get_compiler_version = lambda: "none (torchvision's kernels, through visionattn)"
        module.get_compiling_cuda_version = lambda: "not available"


def build_hint() -> str:
    """The command that builds mmcv with all its operators, for the distribution that is installed."""
    from importlib import metadata

    try:
        name = f"onedl-mmcv=={metadata.version('onedl-mmcv')}"
    except metadata.PackageNotFoundError:
        name = "mmcv"
    return BUILD_HINT + name


def ensure_mmcv_ops() -> None:
    """Makes ``import mmcv.ops`` work: puts the substitute into ``sys.modules`` where mmcv has no compiled extension.

    Does nothing where a compiled extension is installed or already imported. Importing :mod:`visionattn.detection`
    calls it; what modules of mmdet that were imported before that lack (:mod:`.late`) is put right.

    Raises:
        ImportError: mmcv is not installed.
    """
    name = "mmcv._ext"
    if name in sys.modules:
        return
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as e:
        raise ImportError(f'visionattn.detection needs {e.name}: pip install -e ".[detection]"') from None
    if found is not None:
        return
    spec = ModuleSpec(name, _Loader, origin=__file__)
    module = importlib.util.module_from_spec(spec)
    _Loader.exec_module(module)
    sys.modules[name] = module
    sys.modules["mmcv"]._ext = module
    repeat_failed_imports()


def _missing(name: str, *args, **kwargs):
    raise NotImplementedError(
        f"mmcv operator {name!r} has no substitute in visionattn; build mmcv with all of them: {build_hint()}"
    )
