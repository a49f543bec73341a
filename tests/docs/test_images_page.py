"""docs/guide/images_digits.md: its code runs, with fewer steps, and its table is that of the recorded results."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guide" / "images_digits.md").read_text()
SECTIONS = ("labels", "outputs", "labels and states", "outputs and states")
MADE = ("inverted pictures", "a generator's pictures")


def script():
    """scripts/bench/digits.py as a module."""
    spec = importlib.util.spec_from_file_location("digits", ROOT / "scripts" / "bench" / "digits.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_table_is_made_of_the_recorded_results():
    made = script()
    shown = TEXT.partition(made.BEGIN)[2].partition(made.END)[0].strip()
    assert shown == made.table(made.read()).strip(), "run scripts/bench/digits.py --page"


def test_a_row_has_mean_and_range_over_seeds():
    made = script()
    setting = {"rows": 1297, "test_rows": 500, "steps": 2, "teacher_steps": 4, "device": "a CPU", "date": "today"}
    results = {"teacher/0/4+2": {"accuracy": 0.95, "params": 9000, **setting}}
    results |= {
        f"units/{seed}/4+2": {"accuracy": score, "params": size}
        for seed, (score, size) in enumerate([(0.9, 4100), (0.84, 4000), (0.93, 4100)])
    }
    # A run of other numbers of steps, which had more seeds, has a table of its own.
    other = {f"teacher/{seed}/4+20": {"accuracy": 0.5, "params": 9000, **setting, "steps": 20} for seed in range(4)}
    results |= {**other, "units/0/14+2": {"accuracy": 0.1, "params": 1, **setting}}
    assert made.table(results, (4, 20)).splitlines()[-1] == "| teacher | 9,000 | 4 | 50.0 | 50.0 to 50.0 |"
    assert made.table(results) == "Not measured yet.\n"
    lines = made.table(results, (4, 2)).splitlines()
    assert lines[-2:] == [
        "| teacher | 9,000 | 1 | 95.0 | 95.0 to 95.0 |",
        "| the same, recovered by `logits` and `hidden` | 4,000 to 4,100 | 3 | 89.0 | 84.0 to 93.0 |",
    ]


@pytest.mark.slow
def test_the_code_of_the_page_runs_with_three_steps(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code = "\n".join(blocks)
    assert len(blocks) == 4 and code.count("steps = 400") == 1 and code.count("Ascent(60,") == 1
    code = code.replace("steps = 400", "steps = 3").replace("Ascent(60,", "Ascent(3,")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict = {}
    exec(compile(code, "images_digits.md", "exec"), names)
    said = capsys.readouterr().out
    scores = dict(re.findall(r"^([\w' ]+): (\d\.\d{3})", said, re.MULTILINE))
    assert list(scores) == ["teacher", *SECTIONS, *MADE, "half of heads and neurons", "half of layers"]
    assert all(0 <= float(score) <= 1 for score in scores.values())
    whole, cut = (list(names[model].vit.layers) for model in ("teacher", "student"))
    assert len(cut) == len(whole) / 2
