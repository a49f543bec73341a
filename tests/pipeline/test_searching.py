"""Runs that search for their plan: at the plain one's cost, never worse, and the same after a stop."""

import json
import re
from pathlib import Path

import pytest
import yaml
from builders.models import tiny_model
from builders.recipes import recipe_for, write_model
from builders.rounds import Counted, cutter
from builders.runs import rows_of, same, weights, write_learnable_rows

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.pipeline import rounds as cutting
from distill_llm.pruning.searching.fitness import Divergence
from distill_llm.recipe.recipe import parse_recipe

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "search.md"
SEARCH = {"generations": 2, "population": 4, "tokens": 40}
TRAINING = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "use_cpu": True}


class Stopped(BaseException):
    """The end of the process."""


@pytest.mark.slow
def test_a_searched_run_goes_on_after_a_stop_and_shows_its_picture(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    write_learnable_rows(tmp_path / "rows.csv")
    given = recipe_for(
        tmp_path,
        data=rows_of(tmp_path),
        pruning={"keep": 0.5, "rounds": 2, "cuts": 2, "calibration_examples": 8, "search": SEARCH},
        distillation={"losses": {"logits": {}}, **TRAINING},
    )
    distill_llm.run(given, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    found = [row["search"] for row in metrics["rounds"]]
    assert [len(each) for each in found] == [2, 2]
    for each in found[0] + found[1]:
        assert each["best"] == min(best for best, _ in each["history"]) <= each["plain"]
        assert len(each["history"]) == 3 and each["tried"] <= 12
    assert metrics["layer_params_kept"] <= 0.5 * 1.001
    assert (tmp_path / "run" / "figures" / "search.png").stat().st_size > 1000
    assert "figures/search.png" in (tmp_path / "run" / "report.md").read_text()
    assert "fitness by generation" in (tmp_path / "run" / "report.html").read_text()
    assert "searched" in capsys.readouterr().out
    state = json.loads((tmp_path / "run" / "round-1" / "search-1.json").read_text())
    assert len(state["fitness"]) == found[0][0]["tried"]

    measured, measure = [], Divergence.__call__

    def stopping(self, plan):
        measured.append(plan)
        if len(measured) == 6:
            raise Stopped
        return measure(self, plan)

    monkeypatch.setattr(Divergence, "__call__", stopping)
    with pytest.raises(Stopped):
        distill_llm.run(given, tmp_path / "stopped")
    distill_llm.run(given, tmp_path / "stopped")
    assert len(measured) - 1 == sum(each["tried"] for row in found for each in row)  # nothing twice
    for name in ("round-1/plan.json", "round-2/plan.json"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "run" / name).read_text()
    assert same(weights(tmp_path / "stopped" / "student"), weights(tmp_path / "run" / "student"))


@pytest.mark.slow
def test_a_search_under_latency_stays_within_the_plain_plans_time(tmp_path, monkeypatch):
    from distill_llm.pruning.planning.budgets import share_of
    from distill_llm.pruning.units.costs import unit_costs

    # Of a model this small the clock says little: its layers' parameters stand for time.
    times = lambda model, other, *batch: share_of(model, other, "params")  # noqa: E731
    monkeypatch.setattr("distill_llm.pipeline.rounds.relative_latency", times)
    monkeypatch.setattr("distill_llm.pruning.planning.latency.relative_latency", times)
    monkeypatch.setattr(cutting, "latency_costs", lambda model, *batch: unit_costs(model))
    model, settings = tiny_model(layers=4), {"cost": "latency", "units": ["heads", "neurons", "layers"]}
    plain = cutter(tmp_path, Counted(model), **settings).cut(model, model, 0.5)
    found = cutter(tmp_path, Counted(model), **settings, search=SEARCH).cut(model, model, 0.5)
    (search,) = found.searches
    assert search.plain == pytest.approx(search.history[0][0]) or search.history[0][0] < search.plain
    assert found.kept == share_of(found.model, model, "params") <= plain.kept * (1 + 1e-6)
    if search.best < search.plain:
        assert found.plan.layers != plain.plan.layers


@pytest.mark.parametrize(
    "pruning, said",
    [
        ({"keep": 0.5, "units": ["hidden"], "search": {}}, "pruning.units: got ['hidden']"),
        ({"keep": 0.5, "uniform": True, "search": {}}, "pruning.uniform: got True; set it to false"),
        ({"keep": 0.5, "scope": "local", "search": {}}, "pruning.scope: got 'local'; set it to global"),
        ({"layers": [0], "search": {}}, "pruning.search: "),
        ({"weights": {"sparsity": 0.5}, "search": {}}, "pruning.search: "),
        ({"keep": 0.5, "search": {"generations": 0}}, "pruning.search.generations: got 0"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_its_field(tmp_path, pruning, said):
    with pytest.raises(InputError) as error:
        parse_recipe(recipe_for(tmp_path, pruning=pruning))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_of_the_page_is_read(tmp_path):
    for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL):
        assert parse_recipe({**recipe_for(tmp_path), **yaml.safe_load(text)}).pruning.search is not None
