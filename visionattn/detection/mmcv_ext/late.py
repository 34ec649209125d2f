"""Repairs what mmdet gave up on before the operators were there.

mmdet writes ``try: from mmcv.ops import roi_align`` and, on ImportError, defines a function of that name that raises.
Modules that were imported before :mod:`visionattn.detection` keep it: ``mmdet.utils``, which mmdet's ``tools/train.py``
imports first, brings in the masks' ``roi_align`` that Mask R-CNN trains with.
"""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGES = ("mmdet", "mmseg", "mmpretrain", "mmpose", "mmrotate", "mmdet3d")


def repeat_failed_imports() -> list[str]:
    """Repeats the guarded imports of ``mmcv.ops`` in the modules of mmdet and its kin that are loaded.

    Returns:
        ``module.name`` of everything that was bound anew.
    """
    loaded = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in PACKAGES and m is not None]
    return [f"{module.__name__}.{name}" for module in loaded for name in _repeat(module)]


def _repeat(module: ModuleType) -> list[str]:
    file = getattr(module, "__file__", None)
    source = Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") and Path(file).is_file() else ""
    if "mmcv.ops" not in source:
        return []
    names = []
    for guarded in (node for node in ast.parse(source).body if isinstance(node, ast.Try)):
        for statement in (s for s in guarded.body if isinstance(s, ast.ImportFrom) and _of_operators(s)):
            operators = importlib.import_module(statement.module)
            for alias in statement.names:
                name = alias.asname or alias.name
                # what stands in for the operator is defined in the module itself
                if getattr(getattr(module, name, None), "__module__", None) == module.__name__:
                    setattr(module, name, getattr(operators, alias.name))
                    names.append(name)
    return names


def _of_operators(statement: ast.ImportFrom) -> bool:
    return statement.level == 0 and (statement.module == "mmcv.ops" or str(statement.module).startswith("mmcv.ops."))
