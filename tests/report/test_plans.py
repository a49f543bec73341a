"""What a plan keeps, as a table, a picture and the rows of metrics.json."""

import io
import json

import pytest
from builders.families import family_model, uneven_plan
from builders.models import tiny_model
from matplotlib.image import imread
from rich.console import Console

from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.report.plans import kept_by, kept_of, plan_figure, plan_table


def shown(plan: PruningPlan, model) -> list[list[str]]:
    """The table's cells as printed, a list for every line between the rules."""
    out = io.StringIO()
    Console(file=out, width=200).print(plan_table(plan, model, "round 1"))
    lines = [line for line in out.getvalue().splitlines() if line.count("│") + line.count("┃") > 1]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def test_the_table_has_a_line_for_every_layer_with_its_share_of_parameters():
    model = tiny_model(layers=3)
    plan = PruningPlan(
        "bert", (LayerPlan(0, (0, 2), tuple(range(48))), LayerPlan(2, (), tuple(range(64)))), 0.5, "a note"
    )
    lines = shown(plan, model)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.bert.encoder.layer]
    left = [sum(p.numel() for p in layer.parameters()) for layer in prune(model, plan).bert.encoder.layer]
    assert lines == [
        ["layer", "heads", "neurons", "parameters"],
        ["0", "2 / 4", "48 / 64", f"{100 * left[0] / layers[0]:.1f}%"],
        ["1", "–", "–", "removed"],
        ["2", "0 / 4", "64 / 64", f"{100 * left[1] / layers[2]:.1f}%"],
        ["all", "2 / 12", "112 / 192", f"{100 * sum(left) / sum(layers):.1f}%"],
    ]
    assert plan_table(plan, model).caption == "a note"


def test_groups_queries_and_channels_are_told_apart():
    model = family_model("llama")
    plan = uneven_plan(model, hidden=True, queries=True)
    lines = shown(plan, model)
    assert lines[0] == ["layer", "groups", "queries", "neurons", "parameters"]
    assert lines[1][:4] == ["0", "2 / 4", "2 / 8", "35 / 64"]
    assert lines[2][:4] == ["1", "0 / 4", "0 / 8", "22 / 64"]
    student = prune(model, plan)
    left, whole = (sum(p.numel() for p in m.model.layers.parameters()) for m in (student, model))
    assert lines[-1][-1] == f"{100 * left / whole:.1f}%"
    assert "25 of 32 channels" in plan_table(plan, model).caption


@pytest.mark.parametrize("family", ["bert", "llama", "falcon-multi-query", "gpt2", "bloom"])
def test_a_student_keeps_what_its_plan_says_also_of_a_teacher_that_was_pruned(family):
    model = family_model(family)
    plan = uneven_plan(model, hidden=True, queries=True)
    student = prune(model, plan)
    rows, channels = kept_of(student, model)
    assert rows == kept_by(plan, model) and channels == {"kept": 25, "of": 32}
    again = PruningPlan(model.config.model_type, (LayerPlan(0, (0,), (1, 2)), LayerPlan(2, (0,), ())))
    rows, channels = kept_of(prune(student, again), student)
    assert rows == kept_by(again, student) and channels is None
    assert [row["source"] for row in rows] == [0, 2]
    assert json.loads(json.dumps(rows)) == rows
    assert kept_of(model, model) == ([], None)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_picture_has_a_panel_for_every_kind_of_unit(tmp_path, family, monkeypatch):
    model, drawn = family_model(family), []
    plan = uneven_plan(model, hidden=True, queries=True)
    assert imread(plan_figure(plan, model, tmp_path / "plan.png")).shape[0] > 300
    monkeypatch.setattr("distill_llm.report.figures.save", lambda figure, path: drawn.append(figure) or path)
    plan_figure(plan, model, tmp_path / "x.png")
    (figure,) = drawn
    panels = {axes.get_title(loc="left").split(":")[0]: axes for axes in figure.axes}
    assert list(panels) == (
        ["KV groups", "query heads", "FFN neurons"] if family == "llama" else ["attention heads", "FFN neurons"]
    )
    neurons = [text.get_text() for text in panels["FFN neurons"].texts]
    assert neurons == ["35 / 64", "22 / 64", "layer removed", "FFN removed", "3 / 64"]
    assert "attention removed" in [text.get_text() for text in figure.axes[0].texts]
    assert figure.get_suptitle() == "residual stream: 25 of 32 channels kept"
