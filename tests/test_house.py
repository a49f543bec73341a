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
PRUNING_ROOMS = sorted(folder.parent.name for folder in (PACKAGE / "pruning").glob("*/__init__.py"))
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_in(source: str, package: list[str]) -> set[str]:
    """Full names of what a file imports of the package, also inside functions.

    `package` is the package that the file is in, part by part: relative imports count from there. What only type checkers read
    is left out.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types_only = {inner for node in hints for child in node.body for inner in ast.walk(child)}
    for node in ast.walk(tree):
        if node in for_types_only:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return {name for name in found if name.split(".")[0] == "distill_llm"}


def imports_of(file: Path) -> set[str]:
    """Full names of what a file of the package imports of it."""
    return imports_in(file.read_text(), ["distill_llm", *file.relative_to(PACKAGE).parts[:-1]])


def declared(folder: Path, of: str = "") -> set[str]:
    """What a room's docstring lets it import."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    line = re.search(rf"^May import{of}: ([^.]*)\.", text, re.MULTILINE)
    assert line, f"{folder.name}/__init__.py does not say what it may import{of}"
    return set() if line[1].startswith("nothing") else set(line[1].replace("\n", " ").split(", "))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .. import pipeline", "distill_llm.pipeline"),
        ("from ..pipeline import run", "distill_llm.pipeline.run"),
        ("from .loss import sum_of", "distill_llm.training.loss.sum_of"),
        ("from distill_llm import run", "distill_llm.run"),
        ("import distill_llm", "distill_llm"),
        ("import distill_llm.pipeline.run as other", "distill_llm.pipeline.run"),
        ("def late():\n    from distill_llm.cli import main", "distill_llm.cli.main"),
        ("importlib.import_module('distill_llm.cli')", "distill_llm.cli"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import distill_llm.cli", "distill_llm.cli"),
        ("if TYPE_CHECKING:\n    import distill_llm.cli", None),
        ("import torch", None),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: str | None) -> None:
    assert imports_in(source, ["distill_llm", "training"]) == ({found} if found else set())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_docstring_allows(room: str) -> None:
    allowed = declared(PACKAGE / room) | {room}
    assert allowed <= set(ROOMS)
    for file in (PACKAGE / room).rglob("*.py"):
        for name in imports_of(file):
            entered = (
                name.removeprefix("distill_llm").lstrip(".").split(".")[0]
            )  # a room; else the root, which is for users
            assert entered in allowed, f"{file.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_docstring_lists_only_rooms_that_are_imported(room: str) -> None:
    text = "".join(file.read_text() for file in (PACKAGE / room).rglob("*.py"))
    assert {other for other in declared(PACKAGE / room) if f"distill_llm.{other}" not in text} == set()


@pytest.mark.parametrize("room", PRUNING_ROOMS)
def test_a_room_of_pruning_imports_only_what_its_docstring_allows(room: str) -> None:
    allowed = declared(PACKAGE / "pruning" / room, " of pruning") | {room}
    for file in (PACKAGE / "pruning" / room).rglob("*.py"):
        for name in imports_of(file):
            if name.startswith("distill_llm.pruning"):
                entered = name.removeprefix("distill_llm.pruning").lstrip(".").split(".")[0]
                assert entered in allowed, f"{file.relative_to(PACKAGE)} imports {name}"


def test_no_room_stands_above_one_that_it_imports() -> None:
    order = list(
        TopologicalSorter({room: declared(PACKAGE / room) for room in ROOMS}).static_order()
    )  # CycleError: a circle
    assert order[-1] == "cli"


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {".".join(["distill_llm", *file.relative_to(PACKAGE).with_suffix("").parts]): file for file in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        graph[name] = set()
        for imported in imports_of(file):  # a module, or a name in one
            found = imported if imported in modules else imported.rpartition(".")[0]
            assert found in modules, f"{name} imports {imported}"
            graph[name] |= {found} - {name}
    list(TopologicalSorter(graph).static_order())  # CycleError: a circle


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_small(file: Path) -> None:
    text = file.read_text()
    # What pruned checkpoints carry stays in few files; the table of families grows by a row each.
    assert len(text.splitlines()) <= 300 or file.name in ("modeling_pruned.py", "families.py")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, f"{node.name} is long"
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            names = {arg.arg for arg in given if arg} - {"self", "cls"}
            command = file.parent.name == "cli" and node.name == file.stem  # its parameters are the command's options
            assert len(names) <= 8 or command, f"{node.name} has {len(names)} parameters"


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
