"""A student that trains its teacher's own weights is refused; what cannot change may be shared."""

import copy

import pytest
import torch
from builders.trainers import causal_model, model_of, rows, trainer_of, with_lora
from torch import nn

from distill_llm.common.errors import InputError
from distill_llm.models.sharing import check_apart
from distill_llm.teachers import Teacher

LOSSES = {"labels": {}, "logits": {}}


def layers_of_the_teacher(student, teacher):
    student.model.layers = nn.ModuleList([teacher.model.layers[0], teacher.model.layers[2]])


def embeddings(student, teacher):
    student.set_input_embeddings(teacher.get_input_embeddings())


def embedding_weight(student, teacher):
    student.get_input_embeddings().weight = teacher.get_input_embeddings().weight


def head(student, teacher):
    student.lm_head.weight = teacher.lm_head.weight


def view_of_the_head(student, teacher):
    student.model.layers[0].self_attn.q_proj.weight = nn.Parameter(teacher.lm_head.weight.detach()[:32])


def data_of_a_norm(student, teacher):
    student.model.norm.weight.data = teacher.model.norm.weight.data


def buffer(student, teacher):
    student.model.rotary_emb = teacher.model.rotary_emb


def one_frozen_dropout(student, teacher):
    teacher.add_module("dropout", nn.Dropout(0.1))
    student.add_module("dropout", teacher.dropout)


SHARING = {
    layers_of_the_teacher: "model.layers.0",
    embeddings: "model.embed_tokens.weight",
    embedding_weight: "model.embed_tokens.weight",
    head: "lm_head.weight",
    view_of_the_head: "model.layers.0.self_attn.q_proj.weight",
    data_of_a_norm: "model.norm.weight",
    buffer: "model.rotary_emb",
    one_frozen_dropout: "dropout",
}


@pytest.mark.parametrize("share", SHARING, ids=lambda share: share.__name__)
@pytest.mark.parametrize("tied", [False, True])
def test_a_student_made_of_its_teachers_parts_is_refused_by_the_name_of_the_part(tmp_path, share, tied):
    teacher, student = causal_model(tie_word_embeddings=tied), causal_model(layers=2, seed=1, tie_word_embeddings=tied)
    share(student, teacher)
    with pytest.raises(InputError, match=f"^model: got '{SHARING[share]}.*copy") as error:
        trainer_of(tmp_path, student, teacher, rows(teacher), LOSSES)
    assert "\n" not in str(error.value)


def test_a_copied_student_and_one_with_its_teachers_frozen_weights_leave_the_teacher_as_it_was(tmp_path):
    teacher = causal_model()
    before = copy.deepcopy(teacher.state_dict())
    for share in (layers_of_the_teacher, embeddings, head):
        student, source = causal_model(layers=2, seed=1), copy.deepcopy(teacher)
        if share is layers_of_the_teacher:
            share(student, source)
        else:
            share(student, teacher)
            student.get_input_embeddings().requires_grad_(share is not embeddings)
            student.lm_head.requires_grad_(share is not head)
        own = copy.deepcopy(student.state_dict())
        trainer_of(tmp_path, student, teacher, rows(teacher), LOSSES).train()
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
        assert any(not torch.equal(tensor, own[name]) for name, tensor in student.state_dict().items())
        teacher.requires_grad_(True)


def test_adapters_inside_the_teachers_own_layers_are_refused_and_around_a_copys_they_are_not(tmp_path):
    """LoRA is put into the layers themselves: the teacher would run with the student's adapters."""
    teacher = causal_model()
    inside = copy.deepcopy(teacher)
    inside.model.layers = teacher.model.layers
    with pytest.raises(InputError, match=r"^model: got 'model\.layers\.0.*lora"):
        trainer_of(tmp_path, with_lora(inside), teacher, rows(teacher), LOSSES)
    fresh = causal_model()
    memory = {id(parameter): parameter for parameter in fresh.parameters()}
    around = with_lora(copy.deepcopy(fresh, memory))  # the base weights are held once
    trainer_of(tmp_path, around, fresh, rows(teacher), LOSSES).train()


def test_a_teacher_that_is_the_student_on_purpose_is_its_own_business(tmp_path):
    student = causal_model()

    class Itself(Teacher):
        model = student

        def meet(self, student, tokenizer=None):
            return None

        def signals(self, batch, step=0, positions=None, compact=False):
            raise NotImplementedError

    trainer = trainer_of(tmp_path, student, Itself(), rows(student), {"logits": {}})
    assert trainer.model is student


def test_models_without_memory_and_loaded_twice_are_apart(tmp_path):
    with torch.device("meta"):
        check_apart(causal_model(), causal_model())
    model = model_of("masked-lm", layers=1)
    model.save_pretrained(tmp_path)
    check_apart(*(type(model).from_pretrained(tmp_path) for _ in range(2)))
