"""Public names load on first use, and `dir`, completion and type checkers know the same ones."""

import ast
import importlib
import re
import rlcompleter
import subprocess
import sys
from pathlib import Path

import pytest

import distill_llm

LAZY = ["distill_llm", "distill_llm.losses"]


def names_for_type_checkers(package: str) -> list[str]:
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = [alias for node in block.body for alias in node.names]
    assert all(alias.asname == alias.name for alias in imported), "else strict type checkers see no public name"
    return sorted(alias.name for alias in imported)


@pytest.mark.parametrize("package", LAZY)
def test_dir_completion_and_type_checkers_know_the_same_names(package):
    module = importlib.import_module(package)
    assert module.__all__ == dir(module) == names_for_type_checkers(package)
    completer = rlcompleter.Completer({"module": module})
    found = [re.sub(r"\W", "", completer.complete("module.", place)[7:]) for place in range(len(dir(module)))]
    assert set(found) >= set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name, "each from its own module"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'distill_llm' has no attribute 'train'"):
        _ = distill_llm.train


def test_importing_the_package_loads_no_torch():
    code = "import sys, distill_llm, distill_llm.losses; dir(distill_llm), dir(distill_llm.losses); "
    code += "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
