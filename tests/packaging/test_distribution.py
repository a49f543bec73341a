"""What is distributed: one version, typed, with the recipes, and nothing that belongs to this machine."""

import importlib.util
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import distill_llm

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def script() -> ModuleType:
    """scripts/packaging/try_wheel.py"""
    spec = importlib.util.spec_from_file_location("try_wheel", ROOT / "scripts" / "packaging" / "try_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    file = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert file == Path(distill_llm.__file__).resolve()
    assert file.read_text().count(f'__version__ = "{distill_llm.__version__}"') == 1


def test_every_extra_is_tried() -> None:
    assert script().USES.keys() == PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(tmp_path: Path) -> None:
    try:
        wheel, sdist = script().build(tmp_path / "dist", tmp_path / "tools")
    except subprocess.CalledProcessError as error:
        if "hatchling" in error.cmd and "install" in error.cmd:
            pytest.skip("pip finds no index with hatchling")
        pytest.fail(error.stderr[-3000:])
    assert wheel.name == f"distill_llm-{distill_llm.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = archive.read(f"distill_llm-{distill_llm.__version__}.dist-info/entry_points.txt").decode()
    assert "distill-llm = distill_llm.cli.main:app" in entry
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "distill_llm").rglob("*.py")}
    recipes = {
        f"distill_llm/_recipes/{file.relative_to(ROOT / 'recipes')}" for file in (ROOT / "recipes").rglob("*.yaml")
    }
    assert code | recipes | {"distill_llm/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {
        "distill_llm",
        f"distill_llm-{distill_llm.__version__}.dist-info",
    }
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "constraints.txt", "tests/conftest.py", "recipes/quickstart.yaml", "README.md"} <= inside
    assert code <= inside and not any(name.startswith((".venv", "runs", "build")) for name in inside)
