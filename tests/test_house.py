"""The house: which room may import which. A room's docstring says it; the imports are read from the code."""

import ast
import importlib
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import distill_llm

PACKAGE = Path(distill_llm.__file__).parent
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> set[str]:
    """Full names of the modules of the package that a file imports, also inside functions."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types_only = {inner for node in hints for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in for_types_only:
            continue
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join(["distill_llm", *file.relative_to(PACKAGE).parts[: -node.level], *module.split(".")])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("distill_llm.")}


def declared(room: str) -> set[str]:
    """The rooms that a room's docstring lets it import."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    line = re.search(r"^May import: ([^.]*)\.", text, re.MULTILINE)
    assert line, f"{room}/__init__.py does not say what it may import"
    return set() if line[1] == "nothing of the package" else set(line[1].replace("\n", " ").split(", "))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_docstring_allows(room: str) -> None:
    allowed = declared(room) | {room}
    assert allowed <= set(ROOMS)
    for file in (PACKAGE / room).rglob("*.py"):
        for name in imports_of(file):
            entered = name.split(".")[1]
            assert entered in allowed or entered not in ROOMS, f"{file.relative_to(PACKAGE)} imports {name}"


def test_no_room_stands_above_one_that_it_imports() -> None:
    order = list(TopologicalSorter({room: declared(room) for room in ROOMS}).static_order())  # CycleError: a circle
    assert order[-1] == "cli"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {".".join(["distill_llm", *file.relative_to(PACKAGE).with_suffix("").parts]): file for file in FILES}
    graph = {
        name: {other for other in imports_of(file) if other in modules and other != name}
        for name, file in modules.items()
        if file.name != "__init__.py"
    }
    list(TopologicalSorter(graph).static_order())


def test_the_root_holds_only_rooms() -> None:
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_public_names_are_listed_and_exist() -> None:
    assert set(distill_llm.__all__) <= set(dir(distill_llm))
    for name in distill_llm.__all__:
        assert getattr(distill_llm, name) is not None
    for room in ROOMS:
        module = importlib.import_module(f"distill_llm.{room}")
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name)


def test_test_files_have_names_of_their_own_and_share_only_builders() -> None:
    tests = sorted(Path(__file__).parent.rglob("test_*.py"))
    assert len({file.name for file in tests}) == len(tests)
    for file in tests:
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.module if isinstance(node, ast.ImportFrom) else ""
            assert not (name or "").startswith("test_"), f"{file.name} imports {name}: move it to tests/builders"
