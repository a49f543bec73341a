"""`distill-llm prune`: what it makes of a model without a run around it."""

from pathlib import Path

import pytest
from builders.grids import slow
from builders.recipes import write_model
from builders.runs import rows_of, two_rounds, weights

import distill_llm
from distill_llm.checks.prune import open_pruning
from distill_llm.common.errors import InputError, faults_in
from distill_llm.common.locks import alone_in
from distill_llm.pipeline.run import prune_recipe
from distill_llm.pruning.planning.budgets import share_of
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.recipe.recipe import parse_recipe


def pruned_alone(model: Path, out: Path, data: dict, **pruning) -> Path:
    """What `distill-llm prune` makes of a model."""
    given = {"teacher": {"model": str(model)}, "data": data, "pruning": pruning, "output_dir": str(out)}
    return prune_recipe(parse_recipe(given))


def test_pruning_alone_saves_a_smaller_model_and_its_plan_without_training(tmp_path, glue_dir):
    folder = tmp_path
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "of", "film", "good", "bad", "not"]
    write_model(
        folder / "model", words, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}
    )
    data = {"task": "sst2", "path": str(glue_dir / "SST-2"), "max_length": 32}
    out = pruned_alone(folder / "model", folder / "out", data, keep=0.5, calibration_examples=16)
    plan = distill_llm.PruningPlan.load(out / "plan.json")
    kept = distill_llm.load_pretrained(out)
    assert sum(p.numel() for n, p in kept.named_parameters() if ".encoder.layer." in n) == pytest.approx(
        plan.kept * sum(t.numel() for k, t in weights(folder / "model").items() if ".encoder.layer." in k)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"units": ["hidden", "heads", "neurons"], "cost": "memory", "round_to": 4},
        {"criterion": "wanda", "cuts": 2, "min_heads": 1, "min_neurons": 8, "scales": {"steps": 1}},
        {"cost": "latency"},
        *slow(
            {"units": ["attention", "ffn"], "cost": "flops", "loss": "kl"},
            {"units": ["layers"], "criterion": "leave_one_out"},
        ),
    ],
    ids=str,
)
def test_pruning_alone_takes_every_field_of_the_pruning_section(inputs, tmp_path, capsys, monkeypatch, options):
    # Of a model this small the clock says little: its layers' parameters stand for time.
    times = lambda model, other, *batch: share_of(model, other, "params")  # noqa: E731
    for module in ("pipeline.rounds", "pruning.planning.latency"):
        monkeypatch.setattr(f"distill_llm.{module}.relative_latency", times)
    monkeypatch.setattr("distill_llm.pipeline.rounds.latency_costs", lambda model, *batch: unit_costs(model))
    model = inputs / "labelled"
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    write_model(model, max_position_embeddings=64, **names)
    out = pruned_alone(model, tmp_path / "out", rows_of(inputs), keep=0.7, calibration_examples=8, **options)
    plan = distill_llm.PruningPlan.load(out / "plan.json")
    assert 0.4 < plan.kept <= 0.7 * 1.03 and (out / "plan.png").is_file()
    assert distill_llm.load_pretrained(out).num_parameters() < distill_llm.load_pretrained(model).num_parameters()
    printed = capsys.readouterr().out
    assert "parameters" in printed and f"{100 * plan.kept:.1f}% of" in printed
    assert (", a scale for each unit learnt" in " ".join(printed.split())) == ("scales" in options)


def test_a_second_budget_reads_no_data_for_its_importance(inputs, tmp_path, monkeypatch):
    data, file = rows_of(inputs), str(tmp_path / "all" / "statistics.safetensors")
    options = {"calibration_examples": 8, "statistics": file}
    model = inputs / "labelled-too"
    write_model(model, max_position_embeddings=64)
    pruned_alone(model, tmp_path / "first", data, keep=0.7, **options)
    config = distill_llm.load_pretrained(tmp_path / "first").config
    assert config.id2label == {0: "neg", 1: "pos"} and config.label2id == {"neg": 0, "pos": 1}, "the data's names"
    monkeypatch.setattr("distill_llm.pipeline.calibration.collect_statistics", None)
    pruned_alone(model, tmp_path / "second", data, keep=0.5, criterion="taylor", **options)
    kept = [distill_llm.PruningPlan.load(tmp_path / name / "plan.json").kept for name in ("first", "second")]
    assert kept == pytest.approx([0.7, 0.5], rel=0.02)


def test_pruning_alone_refuses_what_it_would_leave_undone(inputs, tmp_path):
    given = two_rounds(inputs, hub={"repo_id": "me/student"}, student={"peft": {"r": 2}})
    with pytest.raises(InputError) as error:
        prune_recipe(parse_recipe({**given, "output_dir": str(tmp_path / "out")}))
    fields = [fault.field for fault in faults_in(error.value)]
    assert fields == ["teacher.train", "student", "distillation", "hub", "pruning.rounds"]
    alone = {"teacher": {"model": str(inputs / "teacher")}, "data": given["data"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="pruning.layers: got"):
        prune_recipe(parse_recipe({**alone, "pruning": {"layers": [0]}}))
    assert not (tmp_path / "out").exists()


def test_pruning_alone_leaves_a_folder_with_files_alone(finished, inputs, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="output_dir"):
        pruned_alone(inputs / "teacher", tmp_path, rows_of(inputs), keep=0.5)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="output_dir"):
        pruned_alone(inputs / "teacher", inputs / "uninterrupted", rows_of(inputs), keep=0.5)
    assert (inputs / "uninterrupted" / "state.json").is_file(), "a run's folder"


def test_a_folder_that_another_command_uses_or_filled_meanwhile_is_left_alone(inputs, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    options = {"keep": 0.7, "calibration_examples": 8}
    with alone_in(tmp_path / "out"), pytest.raises(InputError, match="^output_dir: got .* is using it$"):
        pruned_alone(model, tmp_path / "out", rows_of(inputs), **options)
    assert not (tmp_path / "out").exists()

    def opened(recipe):
        found = open_pruning(recipe)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_text("another's")
        return found

    monkeypatch.setattr("distill_llm.pipeline.run.open_pruning", opened)
    with pytest.raises(InputError, match="^output_dir: got .*a new or empty folder"):
        pruned_alone(model, tmp_path / "out", rows_of(inputs), **options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
