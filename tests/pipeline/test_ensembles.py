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
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_a_teacher_and_itself_with_turned_classes_teach_as_it_does_alone(given, tmp_path, capsys, average):
    distill_llm.run(given, tmp_path / "alone")
    distill_llm.run(with_others(given, tmp_path / "turned", average=average), tmp_path / "both")
    alone, both = (weights(tmp_path / name / "student") for name in ("alone", "both"))
    for name, tensor in alone.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    out = " ".join(capsys.readouterr().out.split())
    assert f"learnt from the mean of 2 teachers' {average}: 0.25 " in out.replace(" / ", "/") and "0.75 " in out


@pytest.mark.slow
def test_another_teacher_changes_the_student_and_a_run_does_not_go_on_with_another(given, tmp_path):
    write_model(tmp_path / "other", max_position_embeddings=64, seed=5, layers=2, hidden=16, **names("neg", "pos"))
    recipe, folder = with_others(given, tmp_path / "other"), tmp_path / "run"
    distill_llm.run(given, tmp_path / "alone")
    distill_llm.run(recipe, folder)
    alone, both = (weights(each / "student") for each in (tmp_path / "alone", folder))
    assert any(not torch.equal(alone[name], both[name]) for name in alone)
    distill_llm.run(recipe, folder)
    write_model(tmp_path / "other", max_position_embeddings=64, seed=6, layers=2, hidden=16, **names("neg", "pos"))
    with pytest.raises(InputError, match=r"^teacher.ensemble.others.0.model: got '.*other': .*since this run began"):
        distill_llm.run(recipe, folder)
