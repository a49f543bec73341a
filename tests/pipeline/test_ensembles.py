"""Runs with several teachers: the recipe's ensemble reaches the training, and a run goes on with the same teachers only."""

import pytest
import torch
from builders.recipes import recipe_for, write_model
from builders.runs import weights, write_learnable_rows

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "use_cpu": True}


def names(*classes) -> dict:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: at for at, name in enumerate(classes)}}


@pytest.fixture
def given(tmp_path):
    """A recipe whose teacher learns from nothing, and the same teacher once more with its classes turned round."""
    write_model(tmp_path / "teacher", max_position_embeddings=64, **names("neg", "pos"))
    write_learnable_rows(tmp_path / "rows.csv")
    write_model(tmp_path / "turned", max_position_embeddings=64, **names("pos", "neg"))
    turned = load_pretrained(tmp_path / "turned")
    turned.load_state_dict(load_pretrained(tmp_path / "teacher").state_dict())
    with torch.no_grad():
        for tensor in turned.classifier.parameters():
            tensor.copy_(tensor.flip(0).clone())
    turned.save_pretrained(tmp_path / "turned")
    return recipe_for(tmp_path, distillation={"losses": {"logits": {}, "hidden": {}}, **TRAINING})


def with_others(given, *models, **ensemble):
    others = [{"model": str(model), "weight": 3} for model in models]
    return {**given, "teacher": {**given["teacher"], "ensemble": {"others": others, **ensemble}}}


@pytest.mark.slow
def test_turned_classes_change_nothing_another_teacher_does_and_a_run_goes_on_with_the_same_ones(
    given, tmp_path, capsys
):
    other = {"max_position_embeddings": 64, "layers": 2, "hidden": 16, **names("neg", "pos")}
    write_model(tmp_path / "other", seed=5, **other)
    recipes = {
        "alone": given,
        "turned": with_others(given, tmp_path / "turned", average="logits"),
        "other": with_others(given, tmp_path / "other"),
    }
    for name, recipe in recipes.items():
        distill_llm.run(recipe, tmp_path / f"run-{name}")
    students = {name: weights(tmp_path / f"run-{name}" / "student") for name in recipes}
    for name, tensor in students["alone"].items():
        if "key.bias" not in name:  # its gradient is 0 but for rounding, which Adam makes steps of
            torch.testing.assert_close(students["turned"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    apart = max((students["other"][name] - tensor).abs().max().item() for name, tensor in students["alone"].items())
    assert apart > 1e-3

    said = f"the mean of 2 teachers' probabilities: 0.25 `{tmp_path}/teacher`, 0.75 `{tmp_path}/other`"
    assert "".join(f", learnt from {said} (".split()) in "".join(capsys.readouterr().out.split())
    assert f"The student learnt from {said}." in (tmp_path / "run-other" / "report.md").read_text()
    card = (tmp_path / "run-other" / "student" / "README.md").read_text()
    assert "0.25 `teacher`, 0.75 `other`." in card and str(tmp_path) not in card
    page = (tmp_path / "run-other" / "report.html").read_text()
    assert "Learnt from" in page and "0.25 teacher, 0.75 other" in page and str(tmp_path) not in page
    assert str(tmp_path) not in (tmp_path / "run-other" / "student" / "metrics.json").read_text()

    write_model(tmp_path / "other", seed=6, **other)
    with pytest.raises(InputError, match=r"^teacher.ensemble.others.0.model: got '.*other'; .*since this run began"):
        distill_llm.run(recipes["other"], tmp_path / "run-other")
