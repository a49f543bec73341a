"""Plans as files, and plans that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from builders.disks import fill_disk
from builders.models import tiny_model
from builders.pruning import plan_of, random_scores
from safetensors.torch import save_file

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.units.sizes import counts_of


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=4, intermediate=128)


def test_plans_survive_json_and_have_the_documented_form(model, tmp_path):
    plan = plan_pruning(model, random_scores(counts_of(model)), 0.4)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["model_type"] == "bert"
    first = plan.layers[0]
    assert record["layers"][0] == {"source": 0, "heads": list(first.heads), "neurons": list(first.neurons)}
    bare = {"model_type": "bert", "layers": [{"source": 3, "heads": [0, 2], "neurons": []}]}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    assert PruningPlan.load(tmp_path / "bare.json") == PruningPlan("bert", (LayerPlan(3, (0, 2), ()),))


def test_a_full_disk_leaves_the_plan_and_the_scores_that_were_there(model, tmp_path, monkeypatch):
    first, second = (random_scores(counts_of(model), seed=seed) for seed in (0, 1))
    for file, old, new in (("plan", full_plan(model), plan_of(model)), ("scores", first, second)):
        old.save(tmp_path / file)
        before = (tmp_path / file).read_bytes()
        with monkeypatch.context() as patch, pytest.raises(InputError, match="^disk: got .*: No space"):
            fill_disk(patch)
            new.save(tmp_path / file)
        assert (tmp_path / file).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("kind", "field"), [(Importance, "scores"), (Statistics, "statistics")])
def test_files_that_are_no_scores_or_statistics_are_refused_in_one_line(tmp_path, kind, field):
    (tmp_path / "text").write_text("no tensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "others")
    save_file({"heads.0.taylor": torch.zeros(1)}, tmp_path / "part", metadata={"criterion": "fisher"})
    for name in ("missing", "text", "others", "part"):
        with pytest.raises(InputError) as caught:
            kind.load(tmp_path / name)
        line = f"{field}: got {str(tmp_path / name)!r}; accepted: {field} saved by {kind.__name__}.save ("
        assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"model_type": "bert", "layers": [{"source": 0}]}',
        '{"model_type": "bert", "layers": 3}',
    ],
)
def test_files_that_are_no_plan_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match="a file that PruningPlan.save wrote") as caught:
        PruningPlan.load(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        PruningPlan.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        ([], "plan.layers"),
        ([(4, (0,), (0,))], "source"),
        ([(-1, (0,), (0,))], "source"),
        ([(1, (0,), (0,)), (0, (0,), (0,))], "source"),
        ([(0, (0,), (0,)), (0, (0,), (0,))], "source"),
        ([(0, (4,), (0,))], "source=0.*heads"),
        ([(0, (1, 0), (0,))], "source=0.*heads"),
        ([(0, (1, 1), (0,))], "source=0.*heads"),
        ([(0, (0,), (-1,))], "source=0.*neurons"),
        ([(0, (0,), (128,))], "source=0.*neurons"),
        ([(0, ("0",), (0,))], "source=0.*heads"),
        ([(0, (0,), (0.5,))], "source=0.*neurons"),
        ([(0, (0,), (0, "a"))], "source=0.*neurons"),
    ],
    ids=str,
)
def test_broken_plans_are_refused_before_anything_is_cut(model, rows, field):
    plan = plan_of(model, rows)
    with pytest.raises(InputError, match=field) as caught:
        prune(model, plan)
    assert "\n" not in str(caught.value)


def test_a_plan_of_another_family_is_refused(model):
    with pytest.raises(InputError, match="plan.model_type: got 'roberta'; accepted: 'bert', the family of the model"):
        prune(model, replace(full_plan(model), model_type="roberta"))


def test_a_printed_plan_is_one_short_line():
    rows = [LayerPlan(0, (0, 2), range(48)), LayerPlan(1, (), range(48)), LayerPlan(4, (1,), range(64), (2, 5))]
    plan = PruningPlan("llama", rows, 0.4567, "a note", hidden=range(24))
    assert str(plan) == (
        "llama plan: 3 layers (0-1,4), heads 0 to 2 per layer, neurons 48 to 64 per layer, queries 2 per layer, hidden 24, "
        "45.7% kept (a note)"
    )
    assert "LayerPlan(source=4" in repr(plan)
