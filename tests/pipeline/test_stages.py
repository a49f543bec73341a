"""Stages of a run: a new one is a file and a row, as docs/development/add-a-stage.md adds it; when a stage is done anew."""

import json
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.recipes import recipe_for, write_model, write_rows
from safetensors.torch import load_file

import distill_llm
from distill_llm.checks.recipe import Opened
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.pipeline import stages
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.folder import RunFolder
from distill_llm.pipeline.lost import lost
from distill_llm.pipeline.stage import Stage, stale
from distill_llm.pipeline.stages.report import Report
from distill_llm.recipe.recipe import parse_recipe

PAGE = Path(__file__).parents[2] / "docs" / "development" / "add-a-stage.md"


@pytest.fixture
def given(tmp_path) -> dict:
    """A recipe that only prunes."""
    write_model(tmp_path / "teacher", id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    write_rows(tmp_path / "rows.csv")
    return recipe_for(tmp_path, distillation=None)


@pytest.fixture
def added(monkeypatch) -> list[str]:
    """The page's stage is in the list; in the result, a name for every time that a stage did its work."""
    monkeypatch.setattr(stages, "LAST", [*stages.LAST])
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    worked: list[str] = []
    for kind in (names["Flops"], Report):
        work = kind.work
        monkeypatch.setattr(
            kind, "work", lambda self, results, work=work: worked.append(self.name) or work(self, results)
        )
    return worked


def flops_by_hand(student: Path, length: int) -> int:
    """A multiply-add as two, of a BERT and one example: linear layers on every token but the head's, and attention."""
    weights = load_file(student / "model.safetensors")
    count = 0
    for name, tensor in weights.items():
        if tensor.dim() == 2 and "embeddings" not in name:
            count += 2 * tensor.numel() * (length if ".layer." in name else 1)
        if name.endswith("query.weight"):
            count += 2 * 2 * tensor.shape[0] * length**2
    return count


@pytest.mark.slow
def test_the_page_adds_a_stage_that_runs_once_and_again_when_its_identity_changes(given, added, tmp_path, capsys):
    folder = tmp_path / "run"

    def run(**evaluation) -> None:
        distill_llm.run(
            {**given, "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}, **evaluation}}, folder
        )

    run()
    expected = {str(length): flops_by_hand(folder / "round-1" / "pruned", length) for length in (4, 8)}
    assert json.loads((folder / "flops.json").read_text()) == expected
    assert added == ["report", "flops"]
    state = json.loads((folder / "state.json").read_text())["stages"]
    assert list(state) == ["teacher", "round-1/prune", "report", "flops"] and state["flops"].keys() == {
        "summary",
        "seconds",
    }
    assert f"flops: {expected['8']:,} for 8 tokens (" in capsys.readouterr().out
    run()
    assert added == ["report", "flops"], "all done"
    run(batch_size=3)
    assert added == ["report", "flops", "report"], "no matter of this stage"
    run(latency={"batch_size": 2, "sequence_length": 6})
    assert added[3:] == ["report", "flops"]
    assert list(json.loads((folder / "flops.json").read_text())) == ["3", "6"]


def test_a_stage_added_to_a_finished_run_is_the_only_one_done(given, tmp_path, request):
    distill_llm.run(given, tmp_path / "run")
    worked = request.getfixturevalue("added")
    distill_llm.run(given, tmp_path / "run")
    assert worked == ["flops"]


class Part(Stage):
    """A stage with a letter for a name, made from other letters and from the recipe's field of its own name."""

    letter, from_ = "", ()

    @property
    def name(self) -> str:
        return self.letter

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return tuple(each for each in self.earlier if each.name in self.from_)

    def identity(self, recipe) -> object:
        return recipe.get(self.letter)

    def work(self, results) -> dict:
        return {}


def parts(reads: dict[str, str]) -> list[Stage]:
    made: list[Stage] = []
    for letter, names in reads.items():
        kind = type(letter, (Part,), {"letter": letter, "from_": tuple(names)})
        made.append(kind(SimpleNamespace(), tuple(made)))
    return made


def test_stale_stages_are_those_that_a_change_or_a_gap_reaches():
    reads = {"a": "", "b": "a", "c": "a", "d": "bc", "e": ""}
    reached = {letter: {letter} for letter in reads}  # by a path from one stage to another
    for letter, names in reads.items():
        for name in reads:
            reached[name] |= {letter} if any(each in reached[name] for each in names) else set()
    for changed, missing in product([*reads, None], repeat=2):
        done = set(reads) - {missing}
        expected = (reached.get(changed, set()) | reached.get(missing, set())) & done
        assert stale(parts(reads), done, {}, {changed: 1}) == expected, (changed, missing)


def test_results_of_stages_that_a_recipe_no_longer_has_stay_until_something_changes():
    done = ["a", "b", "push/x"]
    assert stale(parts({"a": "", "b": "a"}), done, {}, {}) == set()
    assert stale(parts({"a": "", "b": "a"}), done, {}, {"b": 1}) == {"b", "push/x"}


def test_a_stage_must_leave_what_it_says(given, tmp_path):
    class Forgetful(Part):
        letter, outputs = "f", (tmp_path / "run" / "f.json",)

    folder = RunFolder(tmp_path / "run", parse_recipe(given).to_yaml())
    with pytest.raises(FileNotFoundError, match=r"stage f did not write .*f\.json"):
        folder.result(Forgetful(SimpleNamespace()))
    assert folder.results == {}, "so that it is done again"
    with written_whole(tmp_path / "run" / "f.json") as file:
        file.write_text("{}")
    assert folder.result(Forgetful(SimpleNamespace())).keys() == {"seconds"}


def test_a_section_that_a_stage_alone_reads_may_change_and_no_other(given, tmp_path):
    RunFolder(tmp_path / "run", "quantize: {bits: 8}\nseed: 0\n", own_sections=["quantize"])
    RunFolder(tmp_path / "run", "quantize: {bits: 4}\nseed: 0\n", own_sections=["quantize"])
    with pytest.raises(InputError, match="changed since this run was begun: quantize"):
        RunFolder(tmp_path / "run", "quantize: {bits: 2}\nseed: 0\n")
    with pytest.raises(InputError, match="changed since this run was begun: seed: 0 -> "):
        RunFolder(tmp_path / "run", "quantize: {bits: 4}\nseed: 1\n", own_sections=["quantize"])
    assert stages.own_sections() == ["quantize", "report", "export", "hub"]


@pytest.mark.parametrize("pruning, distillation", [(2, True), (1, False), (0, True)])
def test_the_list_of_stages_follows_the_recipe(given, tmp_path, pruning, distillation):
    recipe = {**given, "hub": {"repo_id": "me/student"}}
    recipe["pruning"] = {"keep": 0.5, "rounds": pruning} if pruning else None
    recipe["distillation"] = {"losses": {"logits": {}}} if distillation else None
    recipe["student"] = None if pruning else {"model": str(tmp_path / "teacher")}
    teacher: Any = SimpleNamespace(path=str(tmp_path / "teacher"))
    made = stages.stages_of(Context(Opened(parse_recipe(recipe), teacher, None, None)))
    expected = {
        (2, True): ["teacher", "round-1/prune", "round-1/recover", "round-2/prune", "round-2/recover"],
        (1, False): ["teacher", "round-1/prune"],
        (0, True): ["teacher", "round-1/recover"],
    }[pruning, distillation]
    assert [stage.name for stage in made] == [*expected, "report", "push/me/student"]
    last = tmp_path / "run" / f"round-{max(pruning, 1)}" / ("student" if distillation else "pruned")
    assert made[-2].student.model == last and made[-2].teacher.model == tmp_path / "teacher"
    for stage in made:
        assert {each.name for each in stage.inputs} <= {each.name for each in stage.earlier}


def test_two_stages_of_one_name_are_refused_before_any_work(given, added, tmp_path):
    stages.LAST.append(stages.LAST[-1])
    with pytest.raises(InputError, match="^stage: got 'flops'; give each stage a name of its own"):
        distill_llm.run(given, tmp_path / "run")
    assert added == []


@pytest.mark.parametrize(
    ("done", "broken", "again", "fault", "note"),
    [
        ("tpsr", {}, "", "", ""),
        ("tpsr", {"r": "gone"}, "r", "", "r: done again, since r/file is gone"),
        ("tpsr", {"r": "changed"}, "r", "", "r: done again, since r/file is damaged"),
        ("tpsr", {"t": "gone", "p": "gone", "s": "gone"}, "", "", ""),  # nothing is to be done
        ("tpsr", {"p": "changed"}, "", "", "note: p/file is damaged; this run does not need it"),
        ("tp", {"p": "changed"}, "p", "", "p: done again, since p/file is damaged"),
        ("tp", {"t": "gone"}, "t", "", "t: done again, since t/file is gone"),
        (
            "tp",
            {"t": "changed"},
            "",
            "put it back, or remove t/ of the run to have it trained again: it is damaged, and s",
            "",
        ),
        ("tps", {"p": "changed"}, "", "", "note: p/file is damaged; this run does not need it"),
        ("tps", {"s": "gone", "p": "gone"}, "sp", "", "p: done again, since p/file is gone"),
        ("tpsr", {"r": "gone", "s": "gone", "p": "gone", "t": "gone"}, "rspt", "", "t: done again"),
    ],
)
def test_what_is_lost_is_made_again_where_it_is_needed(tmp_path, done, broken, again, fault, note):
    """A teacher and a student, both trained, with a pruned model between them; and a report that reads the two."""
    made: list[Stage] = []
    for letter, names, trained in (("t", "", True), ("p", "t", False), ("s", "tp", True), ("r", "ts", False)):
        own = {"model": None if letter == "r" else tmp_path / letter, "outputs": (tmp_path / letter,)}
        kind = type(letter, (Part,), {"letter": letter, "from_": tuple(names), "trained": trained, **own})
        made.append(kind(SimpleNamespace(), tuple(made)))
        if broken.get(letter) != "gone":
            (tmp_path / letter).mkdir()
    found = lost(made, done, lambda stage: {f"{stage.name}/file": broken[stage.name]} if stage.name in broken else {})
    assert found.again == set(again)
    assert [name for name, _ in found.faults] == (["t/file"] if fault else [])
    assert all(fix.startswith(fault) for _, fix in found.faults)
    assert (found.notes[0] if found.notes else "").startswith(note) and bool(note) == bool(found.notes)


@pytest.mark.slow
def test_a_file_of_the_page_that_was_deleted_is_written_again(given, added, tmp_path):
    distill_llm.run(given, tmp_path / "run")
    before = (tmp_path / "run" / "flops.json").read_text()
    (tmp_path / "run" / "flops.json").unlink()
    distill_llm.run(given, tmp_path / "run")
    assert added == ["report", "flops", "flops"] and (tmp_path / "run" / "flops.json").read_text() == before


def test_a_stage_with_a_wrong_result_or_identity_is_named(given, tmp_path):
    class Wrong(Part):
        letter = "w"

        def work(self, results) -> dict:
            return {"x": tmp_path}

        def identity(self, recipe) -> object:
            return recipe["evaluation"]["nothing"]

    wrong = Wrong(SimpleNamespace())
    folder = RunFolder(tmp_path / "run", parse_recipe(given).to_yaml())
    with pytest.raises(
        InputError, match="^stage w: got 'Object of type .*Path is not JSON serializable'; return plain"
    ):
        folder.result(wrong)
    assert folder.results == {}
    with pytest.raises(
        InputError, match=r"^stage w: got \"'nothing'\"; let its identity read fields that every recipe"
    ):
        RunFolder(tmp_path / "run", parse_recipe(given).to_yaml(), [wrong])
