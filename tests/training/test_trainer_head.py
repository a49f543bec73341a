"""The heads of language models in training: no logits are held, and everything is as if they were."""

import copy
import re
from pathlib import Path

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import (
    NO_DROPOUT,
    TERMS,
    Vocabulary,
    assert_same_step,
    both_ways,
    causal_model,
    model_of,
    rows,
    step_gradient,
    trainer_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_llm.losses import chunked_head, divergences
from distill_llm.losses.objective import parse_objective
from distill_llm.models import output_head as output_head_module
from distill_llm.models.output_head import output_head
from distill_llm.teachers import as_teacher
from distill_llm.training.loss import TrainingLoss

SCALED = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "qwen3": {"tie_word_embeddings": True},
}
BOTH = {"labels": {"weight": 0.3}, "logits": {"weight": 0.7, "temperature": 2.0}}


@pytest.mark.parametrize("family", SCALED)
def test_scaled_capped_and_tied_heads_give_the_gradients_and_logs_of_whole_logits(tmp_path, monkeypatch, family):
    teacher = causal_model(family, **SCALED[family])
    student = causal_model(family, layers=2, seed=1, **SCALED[family])
    assert_same_step(both_ways(monkeypatch, tmp_path, student, teacher, rows(teacher), BOTH))


@pytest.mark.parametrize("head", ["masked-lm", "causal-lm"])
@pytest.mark.parametrize(
    "losses, settings",
    [
        ({"labels": {}}, {"label_smoothing_factor": 0.1}),
        ({"logits": {"divergence": "reverse_kl", "top_k": 7}}, {}),
        (TERMS["dkd"], {}),
        (TERMS["all"], {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (TERMS["all"], {"activation_checkpointing": True}),
        (BOTH, {"bf16": True}),
    ],
    ids=["smoothing", "top_k", "dkd", "accumulation", "checkpointing", "bf16"],
)
def test_no_setting_tells_chunks_from_whole_logits(tmp_path, monkeypatch, head, losses, settings):
    teacher, student = model_of(head, layers=4), model_of(head, layers=2, seed=1)
    found = both_ways(monkeypatch, tmp_path, student, teacher, rows(teacher), losses, **settings)
    assert_same_step(found, **({"rtol": 3e-2, "atol": 3e-3} if "bf16" in settings else {}))


@pytest.mark.parametrize("rows_of_teacher", [128, 100], ids=["to other sizes", "alike"])
def test_padded_vocabularies_are_compared_over_the_tokens_of_the_tokenizer(tmp_path, monkeypatch, rows_of_teacher):
    teacher, student = causal_model(vocab_size=rows_of_teacher), causal_model(layers=2, seed=1)
    data = rows(student)
    found = both_ways(monkeypatch, tmp_path, student, teacher, data, BOTH, processing_class=Vocabulary(90))
    assert_same_step(found)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labelled, labels = batch["labels"][:, 1:] != -100, batch.pop("labels")[:, 1:]
    q, p = (model.eval()(**batch).logits[:, :-1][labelled].detach().double() for model in (student, teacher))
    own = torch.nn.functional.cross_entropy(q, labels[labelled])  # over all of the student's 100
    q, p = ((each[:, :90] / 2).softmax(-1) for each in (q, p))
    for _, log in found:
        assert log["loss/labels"] == pytest.approx(own.item(), rel=1e-4)
        assert log["loss/logits"] == pytest.approx(4 * (p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_divergence_registered_as_the_page_says_is_trained_with_in_chunks_as_whole(tmp_path, monkeypatch, top_k):
    page = (Path(__file__).parents[2] / "docs" / "development" / "add-a-loss.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "hellinger" in block)
    own = {} if top_k is None else {"top_k": top_k}
    losses = {"logits": {"divergence": "hellinger", "temperature": 2.0, **own}}
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    data = rows(student)
    try:
        exec(example, {})
        found = both_ways(monkeypatch, tmp_path, student, teacher, data, losses)
    finally:
        divergences.DIVERGENCES.pop("hellinger", None)
    assert_same_step(found)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labelled = batch.pop("labels")[:, 1:] != -100
    q, p = ((model.eval()(**batch).logits[:, :-1][labelled].double() / 2).softmax(-1) for model in (student, teacher))
    if top_k is not None:
        best = p.topk(top_k).indices
        q, p = (torch.cat([x.gather(1, best), x.scatter(1, best, 0.0).sum(1, keepdim=True)], 1) for x in (q, p))
    expected = 4 * (1 - (p * q).sqrt().sum(-1)).mean()
    assert found[0][1]["loss/logits"] == pytest.approx(expected.item(), rel=1e-4)


class Sizes(TorchDispatchMode):
    """The most rows of any tensor over the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("head", ["masked-lm", "causal-lm"])
@pytest.mark.parametrize("name", ["labels", "logits", "hidden", "all"])
def test_neither_training_nor_evaluation_holds_more_logits_than_a_chunk(tmp_path, monkeypatch, head, name):
    teacher, student = model_of(head, layers=4), model_of(head, layers=2, seed=1)
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 7 * 4 * 100)
    data = rows(teacher, count=16, length=30)
    sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    trainer = trainer_of(tmp_path, student, teacher, data, TERMS[name], optim="sgd", **sizes)
    with Sizes(100) as sizes:
        trainer.train()
        trainer.evaluate()
    assert sum(int((row["labels"] != -100).sum()) for row in data) > 150
    assert 0 < sizes.rows <= 32, "7 items, or the weight's (32, 100) transpose"


@pytest.mark.parametrize("head", ["masked-lm", "causal-lm"])
def test_the_loss_of_an_evaluation_is_that_of_whole_logits(tmp_path, head):
    student = model_of(head, layers=2)
    trainer = trainer_of(tmp_path, student, None, rows(student), {"labels": {}})
    alone = trainer.evaluate()["eval_loss"]
    trainer.compute_metrics = lambda prediction: {}
    assert alone == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "causal-lm"])
def test_the_loss_of_an_evaluation_is_the_mean_over_labels_of_batches_of_any_size(tmp_path, head, metrics):
    student = model_of(head, layers=2)
    data = rows(student, count=8)
    for row in data[:3]:
        row["labels"] = row["labels"].clone().fill_(-100)
    for row in data[3:5] if head != "sequence-classification" else ():
        row["labels"][3:] = -100
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        expected = student(**batch).loss.item()
    for size in (8, 3, 1):
        trainer = trainer_of(tmp_path, student, None, data, {"labels": {}}, per_device_eval_batch_size=size)
        if metrics:
            trainer.compute_metrics = lambda prediction: {}
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["labels", "all"])
def test_a_wrapper_that_rounds_the_outputs_changes_no_loss_and_leaves_its_gradient(name):
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    batch = {key: torch.stack([row[key] for row in rows(teacher)]) for key in ("input_ids", "attention_mask", "labels")}
    loss = TrainingLoss(parse_objective(TERMS[name]), student, as_teacher(teacher), None, torch.device("cpu"))
    factors = {term: torch.tensor(0.01) for term in loss.objective.terms()}
    found = []
    for _ in range(2):
        student.zero_grad()
        value = loss(student, batch, factors, 0, 1)[0]
        value.backward()
        found.append((value.item(), student.lm_head.weight.grad.clone()))
        student.register_forward_hook(lambda module, args, outputs: setattr(outputs, "loss", outputs.loss.bfloat16()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=0.0)


def test_resumed_training_of_a_causal_lm_ends_with_the_weights_of_an_uninterrupted_run(tmp_path):
    teacher, student = causal_model(), causal_model(layers=2, seed=1, attention_dropout=0.1)
    data, ends = rows(teacher, count=12), []
    settings = {"per_device_train_batch_size": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = copy.deepcopy(student)
        trainer_of(tmp_path, model, teacher, data, TERMS["all"], **settings).train(resume_from_checkpoint=resume)
        ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_a_forward_outside_of_the_loss_gives_logits_as_ever_even_after_one_that_failed(tmp_path):
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    data = rows(teacher)
    trainer = trainer_of(tmp_path, student, teacher, data, BOTH)
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    expected = [model(**batch).logits for model in (student, teacher)]
    trainer.compute_loss(student.train(), {name: torch.stack([row[name] for row in data]) for name in data[0]})
    wrong = {**batch, "labels": torch.full_like(batch["input_ids"], 100)}
    with pytest.raises((RuntimeError, IndexError)):
        trainer.compute_loss(student, wrong)
    for model, logits in zip((student, teacher), expected, strict=True):
        torch.testing.assert_close(model.eval()(**batch).logits, logits)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_head_that_does_more_than_its_config_says_keeps_its_logits(tmp_path, monkeypatch):
    student, teacher = causal_model(layers=2, seed=1), causal_model()
    plain = copy.deepcopy(student)
    assert output_head(student) is not None and output_head(student.model) is None
    forward = student.forward

    def doubled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs

    student.forward = doubled
    assert output_head(student) is None
    monkeypatch.delattr(student, "forward", raising=False)
    plain.lm_head.weight.data *= 2
    data = rows(teacher)
    _, expected = step_gradient(tmp_path, plain, teacher, data, {"labels": {}})
    student.forward = doubled
    trainer = trainer_of(tmp_path, student, teacher, data, {"labels": {}})
    loss = trainer.compute_loss(student.train(), {name: torch.stack([row[name] for row in data]) for name in data[0]})
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)


def test_the_check_of_a_head_leaves_the_random_state_alone():
    model = tiny_model(head="masked-lm", hidden_dropout_prob=0.5).train()
    state = torch.random.get_rng_state()
    assert output_head_module.output_head(model) is not None
    assert torch.equal(state, torch.random.get_rng_state()) and model.training


def test_a_head_with_an_adapter_of_its_own_and_no_plain_map_are_left_to_the_model():
    model = tiny_model(head="masked-lm", **NO_DROPOUT)
    assert output_head(model) is not None
    assert output_head(tiny_model()) is None and output_head(tiny_model(head="token-classification")) is None

    class Rounded(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).round()

    model.cls.predictions.decoder.__class__ = Rounded
    assert output_head(model) is None
