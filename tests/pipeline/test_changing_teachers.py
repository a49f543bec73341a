"""Runs whose teacher changes while the student learns: from a recipe to a student, and through a stop."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.recipes import (
    WORDS,
    causal_recipe,
    faults_at_the_door,
    recipe_for,
    write_decoder,
    write_model,
    write_rows,
)
from builders.runs import same, weights
from builders.stops import LOSSES, TRAINING, stopped_and_resumed, teacher_and_rows

import distill_llm
from distill_llm.checks.recipe import encoded_rows, open_recipe
from distill_llm.common.errors import InputError, faults_in
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.stages.generations import choice
from distill_llm.pipeline.stages.recover import Recover
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers import Peers
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "changing_teachers.md"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return teacher_and_rows(tmp_path_factory.mktemp("changing"))


def given(folder, losses=LOSSES, distillation=None, **teacher):
    teacher = {"model": str(folder / "teacher"), **teacher}
    return recipe_for(folder, teacher=teacher, distillation={"losses": losses, **TRAINING, **(distillation or {})})


def apart(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_page_are_recipes(tmp_path, text):
    recipe = parse_recipe({**recipe_for(tmp_path), **yaml.safe_load(text)})
    section = recipe.teacher
    assert section.is_own or section.checkpoints or section.assistant or recipe.distillation.generations


@pytest.mark.slow
def test_a_run_saves_the_average_that_taught_or_the_student_and_goes_on_with_the_same_bits(folder, monkeypatch):
    asked = {"decay": 0.9, "as_student": True}
    recipe = given(folder, moving_average=asked)
    whole = distill_llm.run(recipe, folder / "whole")
    stopped_and_resumed(recipe, folder / "stopped", monkeypatch, 3)
    assert same(weights(folder / "whole" / "student"), weights(folder / "stopped" / "student"))
    distill_llm.run(given(folder, moving_average={**asked, "as_student": False}), folder / "last")
    distill_llm.run(given(folder), folder / "plain")
    names = ("whole", "last", "plain")
    average, last, plain = (weights(folder / name / "student") for name in names)
    assert apart(average, last) > 1e-3 and apart(last, plain) > 1e-4
    start = weights(folder / "whole" / "round-1" / "pruned")
    assert apart(average, start) < apart(last, start)  # it lags behind
    load_pretrained(whole.student_dir)
    words = "learnt from the moving average of its own weights (decay 0.9)"
    assert f"The student {words}, which was saved in its place." in whole.report.read_text()
    assert words in (folder / "last" / "student" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher, other, words",
    [
        (
            {"quantization": "8bit"},
            {},
            "teacher.quantization: got '8bit'; remove it, or remove teacher.moving_average: ",
        ),
        ({"moving_average": {"decay": 1.0}}, {}, "teacher.moving_average.decay: got 1.0; "),
        ({}, {"losses": {"labels": {}}}, "teacher.moving_average: got {}; remove it: no loss needs a teacher"),
        (
            {"moving_average": {"as_student": True}},
            {"distillation": {"load_best_model_at_end": True}},
            "distillation.load_best_model_at_end: got True; set it to false, or teacher.moving_average.as_student: ",
        ),
    ],
)
def test_what_does_not_go_with_a_moving_average_is_refused_in_one_line(folder, teacher, other, words):
    with pytest.raises(InputError, match="^" + re.escape(words)):
        parse_recipe(given(folder, **other, **{"moving_average": {}, **teacher}))


@pytest.mark.slow
def test_a_given_student_that_was_not_pruned_is_compared_with_itself(tmp_path):
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    write_model(tmp_path / "other", max_position_embeddings=64, layers=2, hidden=16, seed=3)
    write_rows(tmp_path / "rows.csv")
    losses = {"labels": {}, "hidden": {"layers": [[1, 1]]}}
    recipe = given(tmp_path, losses, moving_average={})
    recipe |= {"student": {"model": str(tmp_path / "other")}, "pruning": None}
    assert not faults_at_the_door(parse_recipe(recipe))
    recipe["distillation"]["losses"]["hidden"]["layers"] = [[1, 2]]
    assert len(faults_at_the_door(parse_recipe(recipe))) == 1  # the average has two layers too


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [0, 12])
def test_each_generation_begins_anew_and_learns_from_the_one_before(folder, monkeypatch, held_out):
    recipe = given(folder, {**LOSSES, "hidden": {}, "attention": {}}, {"generations": {"count": 3, "ensemble": True}})
    recipe["data"] |= {"holdout_examples": held_out}
    out = folder / f"generations-{held_out}"
    found = stopped_and_resumed(recipe, out, monkeypatch, 4 + 4 + 3)  # in the third
    state = json.loads((out / "state.json").read_text())["stages"]
    names = [name for name in state if name.startswith("round-1")]
    kinds = ["prune", "recover", "generation-2", "generation-3", "generations"]
    assert names == [f"round-1/{kind}" for kind in kinds]
    trained = [out / "round-1" / name for name in ("student", "generation-2", "generation-3")]
    start = weights(out / "round-1" / "pruned")

    by_hand = teacher_by_hand(recipe, trained[0], folder / f"hand-{held_out}", monkeypatch)
    assert same(by_hand, weights(trained[1]))
    again = teacher_by_hand(recipe, trained[1], folder / f"again-{held_out}", monkeypatch, seed=2)
    assert same(again, weights(trained[2]))
    assert apart(weights(trained[2]), start) < 2 * apart(weights(trained[0]), start)  # not three times as far

    metrics = found.metrics["generations"]
    rows = metrics["students"]
    assert [row["generation"] for row in rows] == [1, 2, 3]
    assert [row["score"] for row in rows] == [state[name]["score"] for name in names[1:4]]
    if held_out:
        scores = [row["metrics"]["validation"] for row in rows]
        assert metrics["chosen"] == scores.index(max(scores)) + 1 and metrics["by"] == "held-out rows"
    else:
        assert metrics["chosen"] == 3 and metrics["by"] is None
    assert same(weights(out / "student"), weights(trained[metrics["chosen"] - 1]))
    assert found.metrics["student"]["score"] == rows[metrics["chosen"] - 1]["score"]
    assert found.metrics["rounds"][0]["score_recovered"] == found.metrics["student"]["score"]
    page, text = found.page.read_text(), found.report.read_text()
    assert "Generations" in page and f"The student is generation {metrics['chosen']}: " in text
    assert text.count("| generation 1 ") == 1 and "| all together" in text

    models = [load_pretrained(path).eval() for path in trained]
    rows_read, correct = encoded_rows(open_recipe(parse_recipe(recipe))).test, 0
    for row in rows_read:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            mean = sum(model(input_ids=ids).logits.softmax(-1) for model in models)
        correct += int(mean.argmax()) == row["labels"]
    assert metrics["ensemble"]["score"] == pytest.approx(correct / len(rows_read))


def teacher_by_hand(recipe, teacher, out, monkeypatch, seed=1):
    """The student of a plain run that is cut from the same model, and learns from `teacher` with this seed of training."""

    def source(stage, weights=None):
        return load_pretrained(teacher)

    plain = {**recipe, "distillation": {**recipe["distillation"], "generations": None}}
    with monkeypatch.context() as patch:
        patch.setattr(Recover, "source", source)
        patch.setattr(Recover, "seed", property(lambda stage: seed))
        distill_llm.run(plain, out)
    return weights(out / "round-1" / "student")


@pytest.mark.slow
def test_a_new_head_of_a_given_student_is_another_in_each_generation_and_adapters_too(tmp_path):
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    write_model(tmp_path / "other", max_position_embeddings=64, layers=2, hidden=16, seed=3, head="masked-lm")
    write_rows(tmp_path / "rows.csv")
    recipe = given(tmp_path, distillation={"generations": 2, "learning_rate": 0.0})
    recipe |= {"student": {"model": str(tmp_path / "other")}, "pruning": None}
    found = distill_llm.run(recipe)
    one, two = (weights(tmp_path / "run" / "round-1" / name) for name in ("student", "generation-2"))
    assert {name for name in one if not torch.equal(one[name], two[name])} >= {"classifier.weight"}
    assert torch.equal(one["bert.embeddings.word_embeddings.weight"], two["bert.embeddings.word_embeddings.weight"])
    assert found.metrics["generations"]["chosen"] == 2 and found.metrics["rounds"] == []


def test_the_best_of_known_scores_is_chosen_else_the_last():
    assert choice([0.5, 0.7, 0.7], True) == 1 and choice([2.0, 3.0, 1.0], False) == 2
    assert choice([None, None], True) == 1 and choice([0.0, -1.0], True) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher, losses, words",
    [
        ({"moving_average": {}}, LOSSES, "got 2; remove it, or remove teacher.moving_average: each generation learns"),
        ({}, {"labels": {}}, "got 2; remove it: no loss needs a teacher"),
    ],
)
def test_generations_that_cannot_teach_are_refused_in_one_line(folder, teacher, losses, words):
    with pytest.raises(InputError, match="^distillation.generations: " + re.escape(words)):
        parse_recipe(given(folder, losses, {"generations": 2}, **teacher))
    with pytest.raises(InputError, match="^distillation.generations.count: got 1"):
        parse_recipe(given(folder, LOSSES, {"generations": 1}))


@pytest.mark.slow
def test_language_models_are_not_scored_together_and_layers_must_be_in_both(tmp_path, folder):
    write_decoder(tmp_path / "teacher")
    again = {"generations": {"count": 2, "ensemble": True}, "losses": {"labels": {}, "logits": {}}}
    faults = faults_at_the_door(causal_recipe(tmp_path, distillation=again))
    assert len(faults) == 1 and faults[0].startswith("distillation.generations.ensemble: got True; leave it out: ")
    write_model(tmp_path / "other", max_position_embeddings=64, layers=2, hidden=16, seed=3)
    recipe = given(folder, {"labels": {}, "hidden": {"layers": [[1, 2]]}}, {"generations": 2})
    recipe |= {"student": {"model": str(tmp_path / "other")}, "pruning": None}
    faults = faults_at_the_door(parse_recipe(recipe))
    assert len(faults) == 1 and faults[0].startswith("distillation.losses.hidden.layers")


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [0, 12])
def test_peers_of_other_sizes_are_cut_trained_saved_and_named_through_a_stop(folder, monkeypatch, held_out):
    write_model(folder / "given", max_position_embeddings=64, layers=2, hidden=16, seed=3, head="masked-lm")
    recipe = given(folder, peers=[{"keep": 0.25}, {"model": str(folder / "given")}])
    recipe["data"] |= {"holdout_examples": held_out}
    out = folder / f"peers-{held_out}"
    found = distill_llm.run(recipe, out)
    stopped_and_resumed(recipe, folder / f"peers-stopped-{held_out}", monkeypatch, 3)
    trained = [out / "round-1" / name for name in ("student", "peer-1/student", "peer-2/student")]
    for path in trained:
        other = folder / f"peers-stopped-{held_out}" / path.relative_to(out)
        assert same(weights(path), weights(other)), path
    assert same(weights(trained[0]), weights(out / "student"))

    alone = folder / f"quarter-{held_out}"
    quarter = {**recipe, "teacher": {"model": str(folder / "teacher")}, "distillation": None}
    quarter["pruning"] = {**recipe["pruning"], "keep": 0.25}
    distill_llm.run(quarter, alone)
    assert same(weights(alone / "round-1" / "pruned"), weights(out / "round-1" / "peer-1" / "pruned"))

    rows = found.metrics["peers"]["students"]
    assert [row["name"] for row in rows] == ["the student", "keep 0.25", "given"]
    for row, path in zip(rows, trained, strict=True):
        model = load_pretrained(path)
        assert row["params"] == sum(each.numel() for each in model.parameters())
    assert rows[0]["params"] > rows[1]["params"] and found.metrics["student"]["score"] == rows[0]["score"]
    text = found.report.read_text()
    assert "The student learnt together with 2 peers, each from the mean of the others' probabilities." in text
    if held_out:
        scores = [row["metrics"]["validation"] for row in rows]
        best = rows[scores.index(max(scores))]["name"]
        assert f"The best on held-out rows: {best}." in text and best in found.page.read_text()
    else:
        assert found.metrics["peers"]["best"] is None and "none of them is named the best" in text


@pytest.mark.slow
def test_the_students_of_a_run_are_those_that_the_trainer_makes(folder):
    recipe = given(folder, peers=[{"keep": 0.25}])
    out = folder / "peers-by-hand"
    distill_llm.run(recipe, out)
    models = [load_pretrained(out / "round-1" / name, dtype=torch.float32) for name in ("pruned", "peer-1/pruned")]
    context = Context(open_recipe(parse_recipe(recipe)))
    args = DistillationConfig(output_dir=str(folder / "own"), losses=LOSSES, report_to="none", seed=0, **TRAINING)
    rows, collator = context.lessons
    DistillationTrainer(models[0], Peers(models[1:]), args, train_dataset=rows, data_collator=collator).train()
    for model, name in zip(models, ("student", "peer-1/student"), strict=True):
        saved = weights(out / "round-1" / name)
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(saved[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


PEERS = [{"keep": 0.25}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher, other, words",
    [
        ({}, {"pruning": {"keep": 0.5, "rounds": 2}}, "pruning.rounds: got 2; set it to 1, or remove teacher.peers: "),
        (
            {},
            {"pruning": {"layers": [0]}},
            "teacher.peers.others.0.keep: got 0.25; give its `model`, or set pruning.keep",
        ),
        ({"dtype": "float32"}, {}, "teacher.dtype: got 'float32'; remove it: no teacher is in memory"),
        ({"moving_average": {}}, {}, "teacher.peers: got "),
        ({"peers": [{}]}, {}, "teacher.peers.others.0"),
        ({"peers": []}, {}, "teacher.peers.others"),
        ({}, {"student": {"peft": {"r": 2}}}, "student.peft: got "),
    ],
)
def test_what_does_not_go_with_peers_is_refused_in_one_line(folder, teacher, other, words):
    with pytest.raises(InputError) as error:
        parse_recipe({**given(folder, **{"peers": PEERS, **teacher}), **other})
    faults = [str(fault) for fault in faults_in(error.value)]
    assert any(fault.startswith(words) for fault in faults), faults
    assert all("\n" not in fault and len(fault) <= 300 for fault in faults)


@pytest.mark.slow
def test_peers_that_do_not_fit_are_refused_at_the_door(folder):
    write_model(folder / "elsewhere", [*WORDS, "more"], max_position_embeddings=64)
    write_model(
        folder / "turned", max_position_embeddings=64, id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1}
    )
    for name, words in (
        ("elsewhere", "got .*elsewhere'; accepted: a model with the tokenizer"),
        ("turned", "got .*turned with labels"),
    ):
        recipe = parse_recipe(given(folder, peers=[{"model": str(folder / name)}]))
        faults = faults_at_the_door(recipe)
        assert len(faults) == 1 and re.match(rf"teacher.peers.others.0.model: {words}", faults[0]), faults
    recipe = parse_recipe(given(folder, {"labels": {}, "hidden": {}}, peers=PEERS))
    faults = faults_at_the_door(recipe)
    assert any(fault.startswith("distillation.losses.hidden: ") and "peers" in fault for fault in faults), faults
