"""Teachers whose weights wait in files: one in memory at a time, the same bits as with all in memory."""

import copy
import gc

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of

from distill_llm.common.errors import InputError
from distill_llm.teachers import Ensemble
from distill_llm.teachers.shelf import ShelvedTeacher


def held(model) -> bool:
    """Whether a model's weights are in memory."""
    return all(each.untyped_storage().nbytes() >= each.nbytes for each in model.parameters())


class Watched(Ensemble):
    """Keeps how many of its models were in memory whenever one of them read."""

    def place(self, *given):
        super().place(*given)
        self.most = []
        for model in self.readers:
            model.register_forward_pre_hook(lambda *_: self.most.append(sum(map(held, self.readers))))


def classifiers():
    return [tiny_model(layers=2, seed=seed, **NO_DROPOUT) for seed in (1, 2, 3)]


def decoders():
    return [causal_model(layers=2, seed=seed, tie_word_embeddings=True) for seed in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [classifiers, decoders])
@pytest.mark.parametrize("settings", [{}, {"teacher_dtype": "bfloat16"}], ids=["fp32", "bf16"])
def test_a_student_ends_with_the_same_bits_and_one_teacher_is_held_at_a_time(tmp_path, make, settings):
    models, student = make(), make()[0]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    data, losses = rows(student, count=16), {"logits": {}, "hidden": {"layers": "uniform"}, "embeddings": {}}

    def trained(teacher):
        own = copy.deepcopy(student)
        trainer_of(tmp_path, own, teacher, data, losses, max_steps=3, **settings).train()
        return list(own.parameters())

    plain = trained(Ensemble(copy.deepcopy(models), [1, 2, 3]))
    shelved = [ShelvedTeacher(model, tmp_path / "waiting") for model in models]
    assert not any(held(model) for model in models)
    ensemble = Watched(shelved, [1, 2, 3])
    assert all(torch.equal(a, b) for a, b in zip(plain, trained(ensemble), strict=True))
    assert len(ensemble.most) == 9 and {*ensemble.most} == {1}
    assert not any(held(model) for model in ensemble.readers)
    assert len(list((tmp_path / "waiting").iterdir())) == 3
    del ensemble, shelved, models  # the models hold what watches them
    gc.collect()
    assert not list((tmp_path / "waiting").iterdir())


def test_quantised_weights_stay_in_memory(tmp_path):
    model = tiny_model(layers=1)
    model.is_quantized = True
    with pytest.raises(InputError, match="^model: got 'a quantised BertForSequenceClassification'"):
        ShelvedTeacher(model, tmp_path)
