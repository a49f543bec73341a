"""Files of a run that are gone, damaged or edited, and inputs that changed: made again, or one line; nothing is mixed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from builders.grids import slow
from builders.runs import same, two_rounds, weights

import distill_llm
from distill_llm.common.errors import InputError, faults_in
from distill_llm.pipeline.stages.prune import Prune
from distill_llm.pipeline.stages.recover import Recover
from distill_llm.pipeline.stages.report import Report
from distill_llm.pipeline.stages.teacher import Teacher
from distill_llm.recipe.recipe import Recipe


@pytest.fixture
def folder(finished, inputs, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(inputs / "uninterrupted", tmp_path / "run"))


@pytest.fixture
def worked(monkeypatch) -> list[str]:
    """A name for every time that a stage did its work."""
    names: list[str] = []
    for kind in (Teacher, Prune, Recover, Report):
        work = kind.work
        monkeypatch.setattr(
            kind, "work", lambda self, results, work=work: names.append(self.name) or work(self, results)
        )
    return names


def damage(file: Path) -> None:
    """Another byte in the middle, as a disk that forgets leaves it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


LOST = {
    "student": lambda run: shutil.rmtree(run / "student"),
    "weights": lambda run: damage(run / "student" / "model.safetensors"),
    "metrics": lambda run: (run / "metrics.json").write_text('{"task'),
    "report": lambda run: (run / "report.md").unlink(),
    "figure": lambda run: (run / "figures" / "kept.png").write_bytes(b""),
    "card": lambda run: (run / "student" / "README.md").write_text(""),
}


@pytest.mark.parametrize("lost", ["student", *slow(*list(LOST)[1:])])
def test_what_the_report_leaves_is_made_again(folder, inputs, worked, lost):
    LOST[lost](folder)
    result = distill_llm.run(two_rounds(inputs), folder)
    assert worked == ["report"]
    whole = inputs / "uninterrupted"
    assert same(weights(folder / "student"), weights(whole / "student"))
    expected = json.loads((whole / "metrics.json").read_text())
    assert result.metrics["student"]["metrics"] == expected["student"]["metrics"]
    assert result.metrics.keys() == expected.keys() and result.metrics["rounds"] == expected["rounds"]
    names = lambda run: {str(path.relative_to(run)) for path in run.rglob("*")}  # noqa: E731
    assert names(folder) == names(whole)


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", ["state.json", "state.backup.json", "recipe.yaml"])
@pytest.mark.parametrize("how", ["empty", "gone", "damaged"])
def test_what_the_run_keeps_of_itself_is_read_from_the_other_copy(folder, inputs, worked, name, how):
    file = folder / name
    {"empty": lambda: file.write_text(""), "gone": file.unlink, "damaged": lambda: damage(file)}[how]()
    distill_llm.run(two_rounds(inputs), folder)
    assert worked == [], "nothing is lost"
    if name == "recipe.yaml":
        text = (inputs / "uninterrupted" / name).read_text().splitlines()
        assert [line for line in file.read_text().splitlines() if "output_dir" not in line] == [
            line for line in text if "output_dir" not in line
        ]


def test_a_state_that_is_lost_twice_is_one_line(folder, inputs, worked):
    for name in ("state.json", "state.backup.json"):
        damage(folder / name)
    with pytest.raises(InputError, match="^output_dir: got .*state.json and state.backup.json are damaged$"):
        distill_llm.run(two_rounds(inputs), folder)
    (folder / "state.backup.json").unlink()
    (folder / "state.json").unlink()
    (folder / "recipe.yaml").write_text("{")
    with pytest.raises(InputError, match="its recipe.yaml is damaged, and state.json is gone$"):
        distill_llm.run(two_rounds(inputs), folder)
    assert worked == []


def test_what_nothing_needs_is_left_alone_and_said(folder, inputs, worked, capsys):
    damage(folder / "round-1" / "plan.json")
    shutil.rmtree(folder / "round-1" / "student")
    (folder / "student" / "README.md").write_text("# My own words")
    distill_llm.run(two_rounds(inputs), folder)
    assert worked == [] and (folder / "student" / "README.md").read_text() == "# My own words"
    assert "note: round-1/plan.json is damaged; this run does not need it" in capsys.readouterr().out
    assert not (folder / "round-1" / "student").exists(), "room that the user made"


def test_a_damaged_model_that_was_trained_is_named_with_what_to_do(folder, inputs, worked):
    shutil.rmtree(folder / "student")
    weights_file = folder / "teacher" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(InputError) as caught:
        distill_llm.run(two_rounds(inputs), folder)
    fix = "put it back, or remove teacher/ of the run to have it trained again: it is damaged, and report needs it"
    assert str(caught.value) == f"output_dir: got {str(weights_file)!r}; {fix}" and worked == []


def test_a_model_that_is_gone_is_made_again_and_what_was_made_from_it_stays(folder, inputs, worked):
    shutil.rmtree(folder / "teacher")
    (folder / "metrics.json").unlink()
    before = (folder / "round-2" / "student" / "model.safetensors").stat().st_mtime_ns
    distill_llm.run(two_rounds(inputs), folder)
    made, gone = weights(folder / "teacher"), weights(inputs / "uninterrupted" / "teacher")
    if same(made, gone):
        assert worked == ["teacher", "report"]
        assert (folder / "round-2" / "student" / "model.safetensors").stat().st_mtime_ns == before
    else:  # a processor may add in another order, by where tensors lie in memory: then it is another teacher
        assert all(torch.allclose(made[name], gone[name], atol=1e-4) for name in gone)
        rounds = [f"round-{number}/{stage}" for number in (1, 2) for stage in ("prune", "recover")]
        assert worked == ["teacher", *rounds, "report"]


@pytest.mark.slow
def test_what_was_made_from_a_model_is_made_again_where_that_is_another_one_now(folder, inputs, worked, monkeypatch):
    shutil.rmtree(folder / "teacher")
    (folder / "metrics.json").unlink()
    other = {"per_device_train_batch_size": 3}  # as on another device, whose sums are rounded otherwise
    fields = Recipe.training
    monkeypatch.setattr(
        Recipe, "training", lambda self, stage: fields(self, stage) | (other if stage == "teacher" else {})
    )
    distill_llm.run(two_rounds(inputs), folder)
    assert worked == ["teacher", "round-1/prune", "round-1/recover", "round-2/prune", "round-2/recover", "report"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda home: (home / "rows.csv").write_text((home / "rows.csv").read_text() + "good film,neg\n"), "data.path"),
        *slow(
            (lambda home: damage(home / "teacher" / "model.safetensors"), "teacher.model"),
            (lambda home: (home / "teacher" / "generation_config.json").write_text("{}"), "teacher.model"),
        ),
    ],
)
def test_an_input_that_changed_is_named_and_nothing_is_mixed(folder, inputs, worked, tmp_path, change, line):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(inputs / "rows.csv", home)
    shutil.copytree(inputs / "teacher", home / "teacher")
    given = {**two_rounds(home), "teacher": {"model": str(home / "teacher")}, "distillation": None}
    given["pruning"] = {"keep": 0.5, "calibration_examples": 8}
    distill_llm.run(given, home / "run")
    done, before = worked.copy(), (home / "run" / "state.json").read_bytes()
    os.utime(home / "rows.csv", (1, 1))
    (home / "teacher" / "README.md").write_text("a card")
    distill_llm.run(given, home / "run")
    assert worked == done, "a new time, or a card, is no change"
    change(home)
    with pytest.raises(InputError) as caught:
        distill_llm.run(given, home / "run")
    (fault,) = faults_in(caught.value)
    assert fault.field == line and "use another output_dir, or put back what it was where you can: " in str(fault)
    assert str(fault).endswith(" since this run began")
    assert worked == done and (home / "run" / "state.json").read_bytes() == before
