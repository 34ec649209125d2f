"""Configs that inherit ``mmseg::...`` where mmsegmentation is installed as ``onedl-mmsegmentation``.

mmengine, also the fork's 0.10.12, looks for ``mmseg::_base_/...`` in a distribution named mmsegmentation, and says that
it is not installed where the fork is. It finds a package by the name that it is imported under as well.
"""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution

from mmengine.config import utils

__all__ = ["find_by_import_name"]


def find_by_import_name() -> list[str]:
    """Lets mmengine look for packages by their import name where no distribution has the name that it knows.

    Returns:
        The packages concerned, such as ``['mmseg']``.
    """
    names = getattr(utils, "MODULE2PACKAGE", {})
    renamed = [m for m, package in names.items() if m != package and not _installed(package) and _importable(m)]
    names.update({module: module for module in renamed})
    return renamed


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
