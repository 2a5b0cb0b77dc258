"""The import floors of spin/. ``python tests/test_floors.py`` prints the drawing that CONTRIBUTING.md shows."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FLOORS = (
    ("core",),
    ("loss", "types"),
    ("pairs", "config"),
    ("data", "model"),
    ("generators", "checkpoint", "run"),
    ("reference", "evaluation", "report"),
    ("training",),
    ("cli", "recipes"),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for folder in ("spin", "recipes") for file in (REPO / folder).rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """Modules of spin that one imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "spin":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found - {module}


IMPORTS = {module: imports_of(module) for module in MODULES if module not in ("spin", "spin.__main__")}


def part_of(module: str) -> str:
    """The folder, or file, of spin/ that a module belongs to."""
    return module.split(".")[1] if module.startswith("spin.") else module.split(".")[0]


def draw() -> str:
    """Each folder with the folders that it imports from, top floor first."""
    lines = []
    for floor, parts in reversed(list(enumerate(FLOORS))):
        for part in parts:
            below = {part_of(name) for module in IMPORTS if part_of(module) == part for name in IMPORTS[module]}
            below = sorted(below & FLOOR_OF.keys() - {part}, key=lambda name: (-FLOOR_OF[name], name))
            suffix = ".py" if part in ("loss", "types") else "/"
            lines.append(f"{floor}  {part + suffix:<12} <- {', '.join(below)}".removesuffix(" <- ").rstrip())
    return "\n".join(lines)


def test_spin_holds_folders_and_four_files():
    files = {path.name for path in (REPO / "spin").iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "loss.py", "types.py", "py.typed"}
    assert {part_of(module) for module in MODULES} - {"spin", "__main__"} == FLOOR_OF.keys()


def test_imports_go_down():
    """Neither up nor to another folder of the same floor."""
    for module, names in IMPORTS.items():
        part = part_of(module)
        up = {name for name in names - {"spin"} if part_of(name) != part and FLOOR_OF[part_of(name)] >= FLOOR_OF[part]}
        assert not up, module


def test_no_modules_import_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_nothing_imports_torchtune_training():
    """It cannot be imported with torchao 0.16 and later; a config may name its metric loggers where it can."""
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            assert not any(name.startswith("torchtune.training") for name in names), module


def test_the_drawing_is_true():
    drawn = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```\n7  cli/", 1)
    assert len(drawn) == 2 and f"7  cli/{drawn[1].split('```')[0]}".strip() == draw(), draw()


if __name__ == "__main__":
    print(draw())
