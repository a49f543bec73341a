"""Training with a teacher that was written to disk: as with the teacher itself, with no model in memory."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import (
    NO_DROPOUT,
    TERMS,
    Vocabulary,
    assert_same_step,
    both_ways,
    cached,
    causal_model,
    model_of,
    rows,
    step_gradient,
    trainer_of,
)

from distill_llm.common.errors import InputError

BOTH = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}


def sharp(head, **config):
    """A teacher sure of its tokens, as language models are: the first ones have nearly all of the probability."""
    model = model_of(head, layers=3, **config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.5)
    return model


def divergence(student, teacher, data):
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    counted = batch.pop("labels")[:, 1:] != -100
    log_q, log_p = (model.eval()(**batch).logits[:, :-1][counted].log_softmax(-1) for model in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("method, close", [("topk", 0.01), pytest.param("sampled", 0.05, marks=pytest.mark.slow)])
def test_fifty_tokens_an_item_teach_as_the_teacher_does(tmp_path, method, close):
    teacher, student = sharp("causal-lm", vocab_size=300), causal_model(layers=2, seed=1, vocab_size=300)
    data = rows(teacher, count=16)
    ends, logs = [], []
    for source in (teacher, cached(tmp_path / "cache", teacher, data, k=50, method=method)):
        model = copy.deepcopy(student)
        trainer = trainer_of(tmp_path, model, source, data, BOTH, max_steps=12)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        ends.append(divergence(model, teacher, data))
    assert ends[0] < 0.8 * divergence(student, teacher, data)
    assert ends[1] == pytest.approx(ends[0], rel=close)
    assert logs[1] == pytest.approx(logs[0], rel=0.01)


@pytest.mark.parametrize("head", [pytest.param("masked-lm", marks=pytest.mark.slow), "causal-lm"])
def test_chunks_accumulation_and_order_do_not_change_what_a_cache_teaches(tmp_path, monkeypatch, head):
    teacher, student = sharp(head), model_of(head, layers=2, seed=1)
    data = rows(teacher)
    source = cached(tmp_path / "cache", teacher, data, k=20)
    whole = step_gradient(tmp_path, student, source, data, BOTH)
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "seed": 11}
    assert_same_step([whole, step_gradient(tmp_path, student, source, list(reversed(data)), BOTH, **small)])
    assert_same_step(both_ways(monkeypatch, tmp_path, student, source, data, BOTH))


def test_a_cache_of_all_classes_teaches_a_classifier_exactly_and_at_any_temperature(tmp_path):
    teacher, student = (
        model_of("sequence-classification", layers=4),
        model_of("sequence-classification", layers=2, seed=1),
    )
    data = rows(teacher)
    source = cached(tmp_path / "cache", teacher, data)
    found = [step_gradient(tmp_path, student, each, data, TERMS["dkd"]) for each in (source, teacher)]
    assert_same_step(found)


def test_the_vocabularys_padding_is_left_out_of_a_cache_of_the_tokens_in_use(tmp_path, monkeypatch):
    teacher, student = sharp("causal-lm", vocab_size=128), causal_model(layers=2, seed=1)
    data = rows(student)
    source = cached(tmp_path / "cache", teacher, data, k=20, method="topk", classes=90)
    assert_same_step(both_ways(monkeypatch, tmp_path, student, source, data, BOTH, processing_class=Vocabulary(90)))


@pytest.mark.parametrize("padded", [100, 128])
def test_a_teacher_in_memory_leaves_out_the_padding_that_its_cache_leaves_out(tmp_path, padded):
    teacher, student = causal_model(vocab_size=padded), causal_model(layers=2, seed=1)
    data = rows(student)
    source = cached(tmp_path / "cache", teacher, data, k=90, classes=90)  # all logits of the tokens
    found = [
        step_gradient(tmp_path, student, each, data, BOTH, processing_class=Vocabulary(90))
        for each in (source, teacher)
    ]
    assert_same_step(found)


@pytest.mark.parametrize(
    "losses, words",
    [
        ({"logits": {"temperature": 2.0}}, "losses.logits.temperature: got 2.0"),
        ({"logits": {"temperature": {"start": 2, "end": 1}}}, "losses.logits.temperature"),
        ({"logits": {"divergence": "jsd"}}, "losses.logits.divergence: got 'jsd'"),
        ({"logits": {}, "hidden": {"layers": "last"}}, "losses.hidden: .*only logits"),
    ],
)
def test_an_objective_beyond_the_cache_is_refused_before_training(tmp_path, losses, words):
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    source = cached(tmp_path / "cache", teacher, rows(teacher), k=20)
    with pytest.raises(InputError, match=words) as error:
        trainer_of(tmp_path, student, source, rows(teacher), losses)
    assert "\n" not in str(error.value)


def test_a_cache_for_another_kind_of_student_is_refused(tmp_path):
    teacher = tiny_model(head="masked-lm", **NO_DROPOUT)
    every = cached(tmp_path / "every", teacher, rows(teacher), k=20)
    some = cached(tmp_path / "some", teacher, rows(teacher), k=20, unlabelled=False)
    for student, source, words in (
        (causal_model(), every, "kind token"),
        (tiny_model(head="masked-lm"), some, "unlabelled=True"),
        (tiny_model(head="masked-lm", vocab=90), every, "100 classes"),
    ):
        with pytest.raises(InputError, match=words) as error:
            trainer_of(tmp_path, student, source, [], {"logits": {}})
        assert "\n" not in str(error.value)
