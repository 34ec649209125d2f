"""Runs mmdet's and mmsegmentation's own tools, or any script, with :mod:`visionattn.detection` imported first.

mmdet's ``tools/test.py`` and ``DetInferencer`` import ``mmcv.ops`` before they read a config, so its ``custom_imports``
come too late where mmcv has no compiled operators::

    python -m visionattn.detection.tool train CONFIG --work-dir DIR
    python -m visionattn.detection.tool test CONFIG CHECKPOINT
    torchrun --nproc-per-node 8 -m visionattn.detection.tool train CONFIG --launcher pytorch
    python -m visionattn.detection.tool my_script.py ARGUMENTS

A name is a script of the installed mmdet (``train``, ``test``, ``analysis_tools/get_flops`` ...), or of mmsegmentation
with ``mmseg/`` before it (``mmseg/train``); a path that ends in ``.py`` is run as it is. Everything after it is the
script's.
"""

import difflib
import importlib.util
import runpy
import sys
from pathlib import Path

import visionattn.detection  # noqa: F401  (operators and registrations, before the script imports mmdet)


def tools() -> dict[str, Path]:
    """The tools by name: mmdet's, and mmsegmentation's after ``mmseg/``."""
    return _tools("mmdet") | {f"mmseg/{name}": file for name, file in _tools("mmseg").items()}


def _tools(package: str) -> dict[str, Path]:
    """``tools/`` of a checkout, or what a wheel carries in ``.mim/tools``."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return {}
    folder = Path(spec.origin).parent
    for tools in (folder / ".mim" / "tools", folder.parent / "tools"):
        if (tools / "train.py").is_file():
            return {str(f.relative_to(tools).with_suffix("")): f for f in sorted(tools.rglob("*.py"))}
    return {}


def main(arguments: list[str]) -> None:
    """Runs the tool or script ``arguments[0]`` with the rest as its command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m visionattn.detection.tool TOOL [ARGUMENTS]\ntools:", *tools(), sep="\n  ")
        return
    name, *rest = arguments
    script = Path(name) if name.endswith(".py") else tools().get(name)
    if script is None or not script.is_file():
        close = difflib.get_close_matches(name, tools(), n=3, cutoff=0.4) or ["train", "test"]
        sys.exit(f"{name!r} is neither a tool of what is installed nor a script; try {', '.join(close)}, or --help")
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
