"""Shipped recipes with random faults load or are refused in lines; scripts/bench/reliability_recipes.py makes thousands."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "scripts" / "bench" / "reliability_recipes.py"


@pytest.mark.slow
def test_recipes_with_random_faults_are_refused_in_lines(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("reliability_recipes", FILE)
    script = importlib.util.module_from_spec(spec)
    folder, path = os.getcwd(), list(sys.path)
    monkeypatch.setattr(sys, "argv", ["reliability_recipes.py", "--count", "80", "--door", "10", "--seed", "7"])
    try:
        spec.loader.exec_module(script)
        assert script.main() == 0, capsys.readouterr().out
    finally:
        os.chdir(folder)
        sys.path[:] = path


def test_the_script_tells_a_traceback_and_a_hang_from_a_refusal(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("reliability_recipes", FILE)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "LIMIT", 0.05)

    def hang(_: Path) -> None:
        while True:
            pass

    def fail(_: Path) -> None:
        raise KeyError("x")

    assert script.outcome(hang, tmp_path).startswith("TimeoutError: 'over 0.05 s'")
    assert script.outcome(fail, tmp_path).startswith("KeyError")
    assert script.outcome(lambda file: script.load_recipe(file / "nothing"), tmp_path) == "refused"
