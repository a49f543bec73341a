"""The loss of a language model's exits against plain formulas in float64, its gradients, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from builders.trainers import causal_model, rows, with_lora

from distill_llm import DistillationConfig, DistillationTrainer, InputError, with_exits
from distill_llm.losses.exits import ExitWeights
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.terms.term import Use
from distill_llm.training.on_policy import ANSWERED

AFTER = (1, 3)
SETTINGS = [
    ExitWeights(0.5, 0.5, 0.05),
    ExitWeights(1.0, 0.0, 0.0),
    ExitWeights(0.0, 1.0, 0.0, 3.0),
    ExitWeights(0.0, 0.0, 2.0),
]
FAMILIES = {"llama": {}, "gemma2": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 3.0}}


def student(family="llama", **config):
    model = with_exits(causal_model(family, layers=4, **FAMILIES.get(family, {}), **config), AFTER)
    with torch.no_grad():
        model.model.norm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def batch_of(model):
    return {name: torch.stack([row[name] for row in rows(model)]) for name in rows(model)[0]}


def dense(model, batch, weights):
    """The sum over the labelled tokens, from the hidden states of transformers itself and whole logits, in float64."""
    model = model.double()
    given = {name: value for name, value in batch.items() if name != "labels"}
    found = model(**given, output_hidden_states=True)
    counted = batch["labels"][:, 1:] != -100

    def items(values):
        return values[:, :-1][counted]

    def logits_of(states):
        held, model.model.forward = model.model.forward, lambda *args, **kwargs: plain(states)
        try:
            return model(**given).logits
        finally:
            model.model.forward = held

    def plain(states):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=states)

    labels, total = batch["labels"][:, 1:][counted], 0.0
    deepest, last = items(found.logits).detach(), items(found.hidden_states[-1]).detach()
    for after in AFTER:
        states = model.model.norm(found.hidden_states[after])
        own = items(logits_of(states))
        total = total + weights.labels * F.cross_entropy(own, labels, reduction="sum")
        p, q = (each / weights.temperature for each in (deepest, own))
        divergence = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
        total = total + weights.logits * weights.temperature**2 * divergence
        total = total + weights.hints * ((items(states) - last) ** 2).mean(-1).sum()
    return total / len(AFTER), int(counted.sum())


def trainer_of(folder, model, losses):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
    args = DistillationConfig(
        str(folder), losses=losses, use_cpu=True, max_steps=1, logging_steps=1, report_to="none", **settings
    )
    return DistillationTrainer(model=model, args=args, train_dataset=rows(model))


@pytest.mark.parametrize("weights", SETTINGS)
def test_a_step_has_the_dense_loss_of_the_final_norm_and_the_head_after_each_exit(tmp_path, weights):
    model = student()
    losses = {"labels": {"weight": 0.25}, "exits": weights._asdict()}
    trainer = trainer_of(tmp_path, model, losses)
    trainer.train()
    log = next(each for each in trainer.state.log_history if "loss" in each)
    total, count = dense(model, batch_of(model), weights)
    assert log["loss/exits"] == pytest.approx(float(total) / count, rel=1e-5)
    assert log["loss"] == pytest.approx(0.25 * log["loss/labels"] + log["loss/exits"], rel=1e-5)


@pytest.mark.parametrize(
    "family, weights, again",
    [("llama", each, False) for each in SETTINGS]
    + [
        ("gemma2", SETTINGS[0], False),
        ("granite", SETTINGS[0], False),
        ("llama", SETTINGS[0], True),
    ],
)
def test_gradients_are_those_of_the_dense_loss_and_the_deepest_layers_get_none(tmp_path, family, weights, again):
    model = student(family).train()
    batch = batch_of(model)
    if again:
        model.activation_checkpointing_enable()
    loss = trainer_of(tmp_path, model, {"labels": {}, "exits": weights._asdict()}).loss
    loss(model, batch, {"exits": torch.tensor(0.5)}, 0, 1).total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.activation_checkpointing_disable()
    (0.5 * dense(model, batch, weights)[0]).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-3, atol=1e-4)
    deepest = [value for name, value in found.items() if ".layers.3." in name]
    assert all(value is None or not value.any() for value in deepest)
    below = found["model.layers.2.mlp.down_proj.weight"]
    assert below is not None and below.abs().max() > 0


@pytest.mark.parametrize("data", [0, 2])
def test_what_the_student_answered_itself_is_no_label_of_its_exits(tmp_path, data):
    model, weights = student().train(), SETTINGS[0]
    batch = batch_of(model)
    loss = trainer_of(tmp_path, model, {"labels": {}, "exits": weights._asdict()}).loss
    answered = torch.arange(len(batch["labels"])) >= data  # rows of the data come first
    found = loss(model, {**batch, ANSWERED: answered}, {"exits": torch.tensor(1.0)}, 0, 1).total
    expected = dense(copy.deepcopy(model), batch, weights._replace(labels=0.0))[0]
    if data:
        first = {name: values[:data] for name, values in batch.items()}
        expected = expected + dense(copy.deepcopy(model), first, ExitWeights(weights.labels, 0.0, 0.0))[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_tokens_are_counted_as_labels_and_a_step_without_the_term_reads_no_exit(tmp_path):
    model = student()
    trainer = trainer_of(tmp_path, model, {"labels": {}, "exits": {}})
    assert trainer.terms.unit("exits") == "labels"
    alone = trainer.loss(model.train(), batch_of(model), {"labels": torch.tensor(1.0)}, 0, 1)
    assert "exits" not in alone.sums and not any(layer._forward_hooks for layer in model.model.layers)


def test_the_model_is_marked_itself_and_gets_no_weights():
    model = causal_model(layers=4)
    names = set(model.state_dict())
    found = with_exits(model, AFTER)
    assert found is model and set(found.state_dict()) == names
    assert model.config.exits == {"after": [1, 3], "draft": None}
    with pytest.raises(InputError, match="^model: got 'LlamaForCausalLM'; accepted: a model without exits"):
        with_exits(model, [2])


def test_what_exits_do_not_go_with_is_one_line(tmp_path):
    cases = [
        (causal_model("gpt2", layers=4), [1], "exits: got 'GPT2LMHeadModel'; accepted: a ...ForSequenceClassification"),
        (
            causal_model("gpt_neox", layers=4),
            [1],
            "exits: got 'GPTNeoXForCausalLM'; accepted: a ...ForCausalLM model of llama",
        ),
        (causal_model(layers=4), [4], r"exits.after: got \[4\]; accepted: numbers of layers from 1 to 3"),
        (causal_model(layers=4), [0, 2], r"exits.after: got \[0, 2\]"),
        (causal_model(layers=4), [], r"exits.after: got \[\]"),
    ]
    for model, after, message in cases:
        with pytest.raises(InputError, match=f"^{message}") as error:
            with_exits(model, after)
        assert len(str(error.value)) <= 300
    for losses, has, message in (
        ({"labels": {}, "exits": {}}, False, "losses.exits: got 'LlamaForCausalLM without exits'"),
        ({"labels": {}}, True, "losses: got 'LlamaForCausalLM without a loss of its exits'"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            trainer_of(tmp_path, student() if has else causal_model(), losses)
    headless = with_lora(student(), modules_to_save=["lm_head"])
    with pytest.raises(
        InputError, match="^model: got 'LlamaForCausalLM'; accepted: a model with exits whose head is a plain"
    ):
        trainer_of(tmp_path, headless, {"labels": {}, "exits": {}})
    objective = parse_objective({"labels": {}, "exits": {}})
    for sharding in ("FSDP2", "DeepSpeed"):
        (fault,) = objective.faults(Use(kind="next_token", sharding=sharding))
        assert str(fault).startswith("losses.exits: got ") and "accepted: DDP" in str(fault)
    assert list(objective.faults(Use(kind="example", sharding="FSDP2"))) == []
