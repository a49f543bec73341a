"""The whole loop on a tiny model: what it leaves behind, what it refuses, and what may change in a run that is done."""

import gc
import json

import pytest
import torch
import yaml
from builders.recipes import recipe_for, write_model
from builders.runs import same, two_rounds, weights, write_learnable_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec
from distill_llm.pipeline.caching import cache_teacher
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.rounds import Cutter, kept_after


def test_a_run_leaves_the_files_of_its_format_and_a_student_that_loads_anywhere(finished, inputs):
    folder = inputs / "uninterrupted"
    for name in [
        "recipe.yaml",
        "state.json",
        "metrics.json",
        "report.md",
        "figures/scores.png",
        "figures/kept.png",
        "teacher/config.json",
        "round-1/statistics.safetensors",
        "round-1/statistics.json",
        "round-1/plan.json",
        "round-1/plan.png",
        "round-1/student/config.json",
        "round-2/plan.json",
        "student/model.safetensors",
        "student/README.md",
        "student/tokenizer_config.json",
    ]:
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*-training"))
    ours = distill_llm.load_pretrained(folder / "student")
    remote = AutoModelForSequenceClassification.from_pretrained(folder / "student", trust_remote_code=True)
    encoded = AutoTokenizer.from_pretrained(folder / "student")("the film 3", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours(**encoded).logits, remote(**encoded).logits)


def test_metrics_json_counts_what_the_saved_models_hold(finished, inputs):
    folder = inputs / "uninterrupted"
    metrics = json.loads((folder / "metrics.json").read_text())
    sizes = {}
    for name, path in (("teacher", "teacher"), ("student", "student")):
        tensors = weights(folder / path)
        sizes[name] = sum(t.numel() for t in tensors.values())
        assert metrics[name]["params"] == sizes[name]
        assert metrics[name]["layer_params"] == sum(t.numel() for k, t in tensors.items() if ".encoder.layer." in k)
    assert metrics["params_kept"] == pytest.approx(sizes["student"] / sizes["teacher"])
    assert 0.49 < metrics["layer_params_kept"] <= 0.5
    assert [row["layer_params_kept"] for row in metrics["rounds"]] == pytest.approx([0.5625, 0.5], abs=0.02)
    assert metrics["retention"] == pytest.approx(metrics["student"]["score"] / metrics["teacher"]["score"])
    assert {"pruned", "compensated", "recovered"} <= metrics["rounds"][0].keys()
    assert all(len(row["compensation"]) == 1 and row["compensation"][0]["rows"] > 0 for row in metrics["rounds"])


def test_a_finished_run_is_not_done_again(finished, inputs):
    before = {p: p.stat().st_mtime_ns for p in (inputs / "uninterrupted").rglob("*") if p.is_file()}
    distill_llm.run(two_rounds(inputs), inputs / "uninterrupted")
    after = {p: p.stat().st_mtime_ns for p in (inputs / "uninterrupted").rglob("*") if p.is_file()}
    assert before == after


def test_a_folder_with_another_run_or_other_files_is_refused_and_left_alone(finished, inputs, tmp_path):
    other = two_rounds(inputs, pruning={"keep": 0.4, "calibration_examples": 8})
    with pytest.raises(InputError, match="output_dir.*pruning.keep: 0.5 -> 0.4"):
        distill_llm.run(other, inputs / "uninterrupted")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="output_dir"):
        distill_llm.run(two_rounds(inputs), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_distillation_alone_trains_a_given_student(finished, inputs):
    given = {
        **two_rounds(inputs, student={"model": str(inputs / "uninterrupted" / "round-1" / "pruned")}),
        "pruning": None,
        "teacher": {"model": str(inputs / "uninterrupted" / "teacher")},
    }
    result = distill_llm.run(given, inputs / "alone")
    assert result.metrics["student"]["params"] < result.metrics["teacher"]["params"]
    assert not same(weights(result.student_dir), weights(inputs / "uninterrupted" / "round-1" / "pruned"))


def test_the_best_checkpoint_is_chosen_by_the_task_metric_on_held_out_rows(tmp_path, monkeypatch):
    write_learnable_rows(tmp_path / "rows.csv", rows=64)
    for name, seed in (("teacher", 0), ("student", 1)):
        write_model(tmp_path / name, max_position_embeddings=64, seed=seed)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "eval_strategy": "steps"}
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 6e-3}
    steps = {"eval_steps": 2, "save_steps": 2}
    given = recipe_for(tmp_path, student={"model": str(tmp_path / "student")}, pruning=None)
    given["data"]["holdout_examples"], given["seed"] = (
        20,
        2,
    )  # a seed whose best step is neither the last nor that of the least loss
    given["distillation"] = {"losses": {"labels": {}}, **best, **training, **steps}
    monkeypatch.setattr(
        "distill_llm.pipeline.stages.recover.remove_checkpoints", lambda *_: None
    )  # leaves the checkpoints to look at
    monkeypatch.setattr("distill_llm.pipeline.stages.recover.open_config", None)  # the teacher was opened at the door
    result = distill_llm.run(given, tmp_path / "run")
    work = tmp_path / "run" / "round-1" / "student-training"
    last = max(int(path.name.rpartition("-")[2]) for path in work.iterdir())
    log = json.loads((work / f"checkpoint-{last}" / "trainer_state.json").read_text())["log_history"]
    accuracy, loss = (
        {row["step"]: row[f"eval_{name}"] for row in log if "eval_loss" in row} for name in ("accuracy", "loss")
    )
    chosen = max(accuracy, key=accuracy.__getitem__)
    assert accuracy[chosen] > accuracy[last] and chosen != min(loss, key=loss.__getitem__), "else it could be by chance"
    assert result.metrics["student"]["metrics"]["validation"] == accuracy[chosen]
    assert same(weights(result.student_dir), weights(work / f"checkpoint-{chosen}"))


@pytest.mark.slow
def test_how_a_student_is_scored_and_pushed_may_change_in_a_run_but_not_what_decides_it(inputs, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("distill_llm.checks.recipe.check_push", lambda *_: None)
    monkeypatch.setattr(
        "distill_llm.report.hub.push", lambda folder, repo_id, private: pushed.append(repo_id) or repo_id
    )
    given = {**two_rounds(inputs), "teacher": {"model": str(inputs / "teacher")}, "distillation": None}
    given["pruning"] = {"keep": 0.5, "calibration_examples": 8}
    distill_llm.run(given, tmp_path / "run")
    for name in ("me/first", "me/first", "me/second"):
        distill_llm.run({**given, "hub": {"repo_id": name}}, tmp_path / "run")
    assert pushed == ["me/first", "me/second"]
    scored = {"batch_size": 3, "latency": {"batch_size": 1, "sequence_length": 8}}
    again = distill_llm.run({**given, "evaluation": scored, "description": "another"}, tmp_path / "run")
    assert again.metrics["latency"] == scored["latency"], "measured anew"
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["evaluation"]["batch_size"] == 3 and written["description"] == "another"
    with pytest.raises(InputError, match="evaluation.max_new_tokens: 64 -> 8"):
        distill_llm.run({**given, "evaluation": {**scored, "max_new_tokens": 8}}, tmp_path / "run")
    by_flops = {**given, "pruning": {**given["pruning"], "cost": "flops"}}
    distill_llm.run(by_flops, tmp_path / "flops")
    distill_llm.run({**by_flops, "evaluation": {**given["evaluation"], "batch_size": 3}}, tmp_path / "flops")
    with pytest.raises(InputError, match="changed since this run was begun: evaluation"):
        distill_llm.run({**by_flops, "evaluation": scored}, tmp_path / "flops")


def test_round_1_cuts_the_teacher_itself_whose_share_is_no_matter_of_a_clock(inputs, tmp_path, monkeypatch):
    seen, cut = [], Cutter.cut
    monkeypatch.setattr(Cutter, "cut", lambda self, a, b, *rest: (seen.append(a is b), cut(self, a, b, *rest))[1])
    given = {**two_rounds(inputs), "teacher": {"model": str(inputs / "teacher")}, "distillation": None}
    distill_llm.run(given, tmp_path / "run")
    assert seen == [True, False]


@pytest.mark.slow
def test_nothing_that_trained_or_was_pruned_lives_on_when_a_model_is_scored(inputs, tmp_path, monkeypatch):
    kinds, bodies, found = (PreTrainedModel, torch.optim.Optimizer), ("BertModel", "PrunedBertModel"), []
    gc.collect()
    before = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    known = {id(each) for each in before}

    def names() -> list[str]:
        alive = [each for each in gc.get_objects() if issubclass(type(each), kinds) and id(each) not in known]
        return sorted(name for each in alive if (name := type(each).__name__) not in bodies)

    evaluate = Context.evaluate
    monkeypatch.setattr(Context, "evaluate", lambda self, model: (found.append(names()), evaluate(self, model))[1])
    teacher, pruned = "BertForSequenceClassification", "PrunedBertForSequenceClassification"
    gc.disable()  # what is freed is freed on purpose
    try:
        distill_llm.run(two_rounds(inputs), tmp_path / "run")
        assert names() == []
    finally:
        gc.enable()
    first, second = [[teacher, pruned]] * 2, [[pruned, pruned]] * 2
    assert found[1:3] == first and found[4:6] == second, found
    assert [found[0], found[3], found[6]] == [[teacher], [pruned], [pruned]]


@pytest.mark.slow
def test_a_cache_of_other_rows_is_refused_before_any_stage(inputs, tmp_path):
    data = DataSpec(**{**two_rounds(inputs)["data"], "max_length": 16})
    cache_teacher(str(inputs / "teacher"), data, tmp_path / "cache")
    teacher = {"model": str(inputs / "teacher"), "cache": str(tmp_path / "cache")}
    given = two_rounds(inputs, teacher=teacher, distillation={"losses": {"logits": {}}, "max_steps": 1})
    given["pruning"] = {"keep": 0.5, "calibration_examples": 8}
    with pytest.raises(InputError, match="^teacher.cache: got .* another data"):
        distill_llm.run({**given, "data": {**given["data"], "max_length": 12}}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert distill_llm.run(given, tmp_path / "run").metrics["retention"] > 0


def test_schedules_end_at_keep_and_cubic_removes_most_early():
    assert [kept_after(0.4, n, 3, "linear") for n in (1, 2, 3)] == pytest.approx([0.8, 0.6, 0.4])
    assert [kept_after(0.2, n, 2, "cubic") for n in (1, 2)] == pytest.approx([0.2 + 0.8 / 8, 0.2])


def test_scores_come_with_their_error_their_rows_and_a_warning_of_a_teacher_that_learnt_nothing(finished):
    metrics, report = finished.metrics, finished.report.read_text()
    for side in ("teacher", "student"):
        score, error, rows = (metrics[side][name] for name in ("score", "standard_error", "rows"))
        assert rows == 4 and error == pytest.approx((score * (1 - score) / rows) ** 0.5)
        assert f"{score:.4f} ± {error:.4f}" in report
    assert metrics["baselines"].keys() == {"the most frequent class", "naive Bayes on words"}
    best = max(metrics["baselines"].values())
    warned = metrics["teacher"]["score"] <= best
    assert bool(metrics["warnings"]) == warned and report.splitlines()[2].startswith("> **Warning:**") == warned
    assert f"naive Bayes on words {metrics['baselines']['naive Bayes on words']:.4f}" in report
