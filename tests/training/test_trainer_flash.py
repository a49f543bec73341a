"""Students and teachers under flash attention: the losses of other kernels, or a refusal."""

import pytest
import torch
from builders.flash import with_flash
from builders.trainers import causal_model, model_of, rows, step_gradient, trainer_of
from transformers.integrations import flash_attention

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import Wanted
from distill_llm.models.capture import Recorder
from distill_llm.models.output_head import output_head
from distill_llm.models.recording import Recording

LOSSES = {
    "labels": {},
    "logits": {},
    "hidden": {"layers": "uniform"},
    "attention": {"layers": "uniform"},
    "relations": {"layers": "last", "heads": 4},
}


def models(head="causal-lm"):
    return model_of(head, layers=2, seed=1), model_of(head, layers=4)


def packed_row(lengths=(4, 6)):
    """One row of sequences, as the collator of packed rows makes it."""
    ids = torch.randint(3, 100, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "position_ids": positions}


@pytest.mark.parametrize("head", ["causal-lm", "masked-lm"])
def test_every_term_of_a_student_in_mixed_precision_is_that_of_another_kernel(tmp_path, monkeypatch, head):
    data = rows(models(head)[0])
    _, expected = step_gradient(tmp_path, *models(head), data, LOSSES, bf16=True)
    flash = [with_flash(model, monkeypatch) for model in models(head)]
    gradients, log = step_gradient(tmp_path, *flash, data, LOSSES, bf16=True)
    for name in ("loss", *(f"loss/{term}" for term in LOSSES)):
        assert log[name] == pytest.approx(expected[name], rel=0.02), name
    assert gradients and all(gradient.isfinite().all() for gradient in gradients.values())
    assert {model.config._attn_implementation for model in flash} == {"flash_attention_2"}


def test_the_output_map_of_weights_in_fp32_is_found(monkeypatch):
    student = with_flash(causal_model(), monkeypatch)
    assert output_head(student) is not None
    student.set_attn_implementation("sdpa")
    assert output_head(student) is not None


@pytest.mark.parametrize("head", ["causal-lm", "masked-lm"])
def test_the_output_map_of_a_model_that_is_still_on_a_cpu_is_found(monkeypatch, head):
    """Where sharding is to place it, or evaluation in bf16, Trainer leaves a model where it was loaded."""
    student = with_flash(model_of(head, layers=2), monkeypatch)

    def on_cpu(*args, **settings):
        raise NotImplementedError("no kernel for the CPU")

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", on_cpu)
    with pytest.raises(NotImplementedError):
        student(input_ids=torch.zeros(1, 1, dtype=torch.long))
    assert output_head(student) is not None
    assert student.config._attn_implementation == "flash_attention_2"


def test_packed_rows_are_taken_one_in_a_batch_and_refused_together(tmp_path, monkeypatch):
    losses = {"labels": {}, "logits": {}, "hidden": {"layers": "uniform"}}
    data, size = [packed_row(), packed_row((7, 3))], {"per_device_train_batch_size": 1, "max_steps": 2}
    _, expected = step_gradient(tmp_path, *models(), data, losses, bf16=True, **size)
    flash = [with_flash(model, monkeypatch) for model in models()]
    _, log = step_gradient(tmp_path, *flash, data, losses, bf16=True, **size)
    assert log["loss"] == pytest.approx(expected["loss"], rel=0.02)
    trainer = trainer_of(tmp_path, *flash, data, losses, bf16=True, per_device_train_batch_size=2)
    with pytest.raises(InputError, match="position_ids: got '2 packed rows .* flash attention'") as error:
        trainer.train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, words", [("mistral", "a sliding window of 4"), ("llama", "packed rows")])
def test_attention_that_no_mask_tells_of_is_refused(monkeypatch, family, words):
    window = {"sliding_window": 4} if family == "mistral" else {}
    model = with_flash(causal_model(family, **window), monkeypatch).to(torch.bfloat16)
    row = {name: values[None] for name, values in packed_row().items()}
    inputs = {"input_ids": row["input_ids"], "use_cache": False}
    packing = {"position_ids": row["position_ids"]} if family == "llama" else {}
    refused = pytest.raises(InputError, match=f"attention: .* with {words}.*sdpa")
    with refused as error, Recorder(model, Wanted(attention=(0,))).recording():
        model(**inputs, **packing)
    assert "\n" not in str(error.value)
    with Recorder(model, Wanted(vectors=(0,))).recording():  # relations look at queries, keys and values alone
        model(**inputs, **packing)
    with Recorder(model, Wanted(attention=(0,))).recording():  # no window, or no sequence, ends in four tokens
        model(input_ids=row["input_ids"][:, :4], use_cache=False)


def test_attention_sinks_are_refused_under_any_kernel():
    model, query = causal_model(), torch.randn(1, 4, 3, 8)
    module = model.model.layers[0].self_attn
    with pytest.raises(InputError, match="attention: .*s_aux"):
        Recording().add_attention(0, module, query, query, None, {"s_aux": torch.zeros(4)})
