"""Imports point one way: ops <- layers <- models <- {detection, training, checkpoints, cli} and ops <- diffusion."""

import ast
import functools
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "visionattn"

# files, processes, the meta device, missing extras: what every room may import
OPEN = {"_files", "_world", "_meta", "_extras"}
# room: the rooms that it may import from; every room may import from itself
ARROWS = {
    **{name: set() for name in OPEN},
    "_timm": set(),  # timm's private parts, re-exported
    "ops": set(),
    "layers": {"ops", "_timm"},
    "models": {"layers", "ops", "_timm"},
    "detection": {"models", "layers", "ops", "_timm"},
    "training": {"models", "layers", "ops", "_timm", ""},
    "checkpoints": {"models", "layers", "ops", "_timm", ""},
    "diffusion": {"ops"},
    "maps": {"models", "layers", "ops", "_timm"},
    "plots": {"ops"},
    # what a user starts may use all; '' is the package's own public names
    "cli": {
        "checkpoints",
        "training",
        "detection",
        "diffusion",
        "models",
        "layers",
        "ops",
        "_timm",
        "maps",
        "plots",
        "",
    },
    "": {"models", "layers", "ops"},
    "__main__": {"cli"},
}
# the same walls seen from outside: timm stops at the layers' door, diffusers and mmdet at their rooms'
OPTIONAL = {
    "diffusers": {"diffusion", "models"},
    "transformers": {"diffusion"},
    "accelerate": {"diffusion"},
    "mmdet": {"detection"},
    "mmcv": {"detection"},
    "mmengine": {"detection"},
    "natten": {"ops"},
    "sklearn": {"training", "cli", "detection"},
    "matplotlib": {"training", "plots"},
    "torchvision": {"training", "cli", "models", "detection"},
}


@functools.cache
def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The first part of the path below the package; '' for the package's own ``__init__``."""
    first = file.relative_to(PACKAGE).parts[0]
    return {"__init__.py": ""}.get(first, first.removesuffix(".py"))


def imported(file: Path, tree: ast.AST | None = None) -> list[tuple[str, int]]:
    """(dotted name, line) of every import in a file, wherever in it; relative ones resolved."""
    package = ["visionattn", *file.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(tree or ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            # 'from visionattn import ops' names a room in the alias
            found.extend((".".join([*module, alias.name]), node.lineno) for alias in node.names)
    return found


def target_room(name: str) -> str | None:
    """The room of ours that a dotted name lies in, None for another package's."""
    parts = name.split(".")
    if parts[0] != "visionattn":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in rooms() else ""


@functools.cache
def rooms() -> set[str]:
    return {room(file) for file in files()}


def breaches(file: Path, tree: ast.AST | None = None) -> list[str]:
    own = room(file)
    found = []
    for name, line in imported(file, tree):
        target = target_room(name)
        if target is not None and target != own and target not in ARROWS[own] | OPEN:
            found.append(f"{file.name}:{line} imports {name}: {own or 'the package'} may not know {target or 'it'}")
    return found


def test_every_room_has_arrows():
    assert rooms() <= set(ARROWS), "a new room: say in ARROWS what it may import"


@pytest.mark.parametrize("name", sorted(rooms()))
def test_arrows(name):
    assert [breach for file in files() if room(file) == name for breach in breaches(file)] == []


def test_ops_know_no_framework():
    """timm is the layers' and models' affair."""
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "natten", "visionattn", "numpy", "scipy"}
    strange = [
        f"{file.name}:{line} imports {module}"
        for file in files()
        if room(file) == "ops"
        for module, line in imported(file)
        if module.split(".")[0] not in allowed
    ]
    assert strange == []


def test_optional_packages_stay_in_their_rooms():
    """That none of them is loaded with the package is test_import.py's affair."""
    strange = []
    for file in files():
        for module, line in imported(file):
            top = module.split(".")[0]
            if room(file) not in OPTIONAL.get(top, {room(file)}):
                strange.append(f"{file.name}:{line}: {top} belongs to {', '.join(sorted(OPTIONAL[top]))}")
    assert strange == []


@pytest.mark.parametrize(
    "path, source, caught",
    [
        ("ops/x.py", "from visionattn.layers import ELA", True),
        ("ops/x.py", "from ..layers.ela import ELA", True),
        ("ops/x.py", "from visionattn import layers", True),
        ("ops/x.py", "def f():\n    import visionattn.models.ela", True),
        ("ops/local/x.py", "from ..halo import halo_attention", False),
        ("ops/local/x.py", "from ...layers import ELA", True),
        ("layers/x.py", "from visionattn.ops import halo", False),
        ("layers/x.py", "import visionattn", True),
        ("diffusion/x.py", "from visionattn._files import lock", False),
        ("_world.py", "from .ops import halo", True),
        ("diffusion/x.py", "from visionattn.layers import ELA", True),
        ("models/x.py", "from visionattn.training import config", True),
    ],
)
def test_breaches_are_seen(path, source, caught):
    assert bool(breaches(PACKAGE / path, ast.parse(source))) is caught
