"""Batches that bring their own positions: losses are those of every sequence alone, without padding."""

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, cached, causal_model, step_gradient, trainer_of
from transformers import DataCollatorWithFlattening

from distill_llm.common.errors import InputError
from distill_llm.evaluation.perplexity import causal_loss
from distill_llm.losses.items import count_items, targets
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.limits import batch_faults, limits_of
from distill_llm.pruning.statistics.calibration_loss import calibration_loss

LENGTHS = (5, 7, 2)


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(3, 100, (length,), generator=generator) for length in lengths]


def alone(model, ids, **inputs):
    """(T, C) or (C,) logits of one sequence, with no padding and no mask."""
    with torch.no_grad():
        return model(input_ids=ids[None], **{name: each[None] for name, each in inputs.items()}).logits[0]


def divergence(teacher, student):
    """The sum of KL(teacher || student) of logits (..., C)."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def cross_entropy(logits, ids):
    """The sum of the losses of the next tokens of a sequence."""
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))


def padded(ids, width, left=False, value=0):
    padding = ids.new_full((width - len(ids),), value)
    return torch.cat([padding, ids] if left else [ids, padding])


@pytest.mark.parametrize("positions", ["one after the other", "by segment"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_keeps_its_mask_whatever_its_positions_are(tmp_path, family, positions):
    start = {"bert": 0, "roberta": 2}[family]
    models = [tiny_model(family, seed=seed, **NO_DROPOUT) for seed in (0, 1)]
    width, rows, total = 9, [], 0.0
    for ids in sequences():
        own = start + torch.arange(len(ids)) % (2 if positions == "by segment" else 99)
        total += divergence(*(alone(model, ids, position_ids=own) for model in models))
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": own}
        rows.append({name: padded(each, width) for name, each in row.items()})
        rows[-1]["labels"] = torch.tensor(1)
    _, log = step_gradient(tmp_path, models[1], models[0], rows, {"logits": {}}, per_device_train_batch_size=len(rows))
    assert total > 0.1 and log["loss/logits"] == pytest.approx(total / len(rows), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("from_zero", [True, False])
def test_a_decoder_keeps_the_mask_of_rows_padded_on_the_left(tmp_path, family, from_zero):
    """Positions count the padding too, or the tokens alone."""
    models = [causal_model(family, layers=2, seed=seed, dropout=0.0) for seed in (0, 1)]
    width, rows, total, items = 9, [], 0.0, 0
    for ids in sequences():
        first = width - len(ids)
        own = torch.arange(len(ids)) + (first if from_zero else 0)
        logits = [alone(model, ids, position_ids=own)[:-1] for model in models]
        total, items = total + divergence(*logits), items + len(ids) - 1
        places = torch.arange(width) if from_zero else padded(own, width, left=True, value=1)
        row = {"input_ids": padded(ids, width, left=True), "position_ids": places}
        row |= {"attention_mask": (torch.arange(width) >= first).long()}
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        rows.append(row)
    _, log = step_gradient(tmp_path, models[1], models[0], rows, {"logits": {}}, per_device_train_batch_size=len(rows))
    assert log["loss/logits"] == pytest.approx(total / items, rel=1e-4)


def packed_row(parts, width=None, labels=True):
    """One row of several sequences, with its own tokens as labels; padded and masked where a width is given."""
    ids = torch.cat(parts)
    width = width or len(ids)
    row = {"input_ids": padded(ids, width), "attention_mask": padded(torch.ones_like(ids), width)}
    row["position_ids"] = padded(torch.cat([torch.arange(len(part)) for part in parts]), width)
    return row | ({"labels": padded(ids, width, value=-100)} if labels else {})


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("width", [14, 17])
def test_no_token_of_a_packed_row_predicts_one_of_the_next_sequence(tmp_path, width, labels):
    models, parts = [causal_model(layers=2, seed=seed) for seed in (0, 1)], sequences()
    logits = [[alone(model, part) for part in parts] for model in models]
    kl = sum(divergence(p[:-1], q[:-1]) for p, q in zip(*logits, strict=True))
    ce = sum(cross_entropy(own, part) for own, part in zip(logits[1], parts, strict=True))
    items = sum(LENGTHS) - len(LENGTHS)
    losses = {"logits": {}, **({"labels": {}} if labels else {})}
    row = packed_row(parts, width, labels)
    _, log = step_gradient(tmp_path, models[1], models[0], [row], losses, per_device_train_batch_size=1)
    assert log["loss/logits"] == pytest.approx(kl / items, rel=1e-4)
    assert not labels or log["loss/labels"] == pytest.approx(ce / items, rel=1e-4)
    batch = {name: each[None] for name, each in row.items()}
    assert count_items(batch, "next_token").tolist() == [items, 1, sum(LENGTHS)]
    borders = {sum(LENGTHS[:place]) - 1 for place in range(1, len(LENGTHS) + 1)}
    assert targets(batch, "next_token")[0].tolist() == [at for at in range(sum(LENGTHS)) if at not in borders]
    if not labels:
        return
    found, count = (each.sum() for each in causal_loss(models[1], batch))
    assert (float(found), count) == (pytest.approx(ce, rel=1e-4), items)
    evaluated = trainer_of(tmp_path, models[1], None, [row, row, row], {"labels": {}}).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(ce / items, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [True, False])
def test_positions_that_jump_part_sequences_only_without_a_mask(tmp_path, family, masked):
    """As the model itself does: with a mask, a row whose positions never start again is one sequence."""
    models = [causal_model(family, layers=2, seed=seed) for seed in (0, 1)]
    ids, positions = torch.cat(sequences((5, 7))), torch.cat([torch.arange(5), torch.arange(20, 27)])
    kl = items = 0
    for start, end in [(0, 12)] if masked else [(0, 5), (5, 12)]:
        mask = torch.ones(end - start, dtype=torch.long)
        given = {"position_ids": positions[start:end], "attention_mask": mask}
        logits = [alone(model, ids[start:end], **given)[:-1] for model in models]
        kl, items = kl + divergence(*logits), items + end - start - 1
    row = {"input_ids": ids, "position_ids": positions, "labels": ids}
    row |= {"attention_mask": torch.ones_like(ids)} if masked else {}
    _, log = step_gradient(tmp_path, models[1], models[0], [row], {"logits": {}}, per_device_train_batch_size=1)
    assert log["loss/logits"] == pytest.approx(kl / items, rel=1e-4)


def test_a_cache_and_the_loss_of_a_calibration_pass_stop_at_the_borders_of_sequences(tmp_path):
    models, parts = [causal_model(layers=2, seed=seed) for seed in (0, 1)], sequences()
    logits = [[alone(model, part) for part in parts] for model in models]
    kl = sum(divergence(p[:-1], q[:-1]) for p, q in zip(*logits, strict=True))
    ce = sum(cross_entropy(own, part) for own, part in zip(logits[1], parts, strict=True))
    row = packed_row(parts, 17)
    teacher = cached(tmp_path / "cache", models[0], [row], k=100)
    _, log = step_gradient(tmp_path, models[1], teacher, [row], {"logits": {}}, per_device_train_batch_size=1)
    assert log["loss/logits"] == pytest.approx(kl / (sum(LENGTHS) - len(LENGTHS)), rel=1e-3)
    batch, generator = {name: each[None] for name, each in row.items()}, torch.Generator()
    losses = [calibration_loss(models[1], batch, loss, models[0], generator) for loss in ("labels", "kl")]
    assert [float(loss) for loss in losses] == pytest.approx([ce, kl], rel=1e-4)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("family", ["opt", "bloom", "falcon", "bert"])
def test_a_family_that_mixes_the_sequences_of_a_flattened_batch_is_refused(tmp_path, family, side):
    mixing, apart = causal_model(family, layers=1, is_decoder=True), causal_model(layers=1)
    student, teacher = (mixing, None) if side == "student" else (apart, mixing)
    losses = {"labels": {}} if side == "student" else {"logits": {}}
    rows = [{"input_ids": part, "labels": part} for part in sequences()]

    def trainer(collator):
        made = trainer_of(tmp_path, student, teacher, rows, losses, remove_unused_columns=False)
        made.data_collator = collator
        return made

    flat = DataCollatorWithFlattening()
    words = f"leave packing out: {family} mixes the sequences of a row"
    with pytest.raises(InputError, match=f"^position_ids: got 'packed rows'; {words}"):
        trainer(lambda rows: flat(rows)).train()  # any other collator shows in the batch
    with pytest.raises(InputError, match=f"^data_collator: got 'DataCollatorWithFlattening'; {words}"):
        trainer_of(tmp_path, student, teacher, rows, losses, data_collator=flat)


def test_borders_that_no_model_reads_and_positions_that_it_does_not_have_are_refused():
    model, ids = causal_model(layers=1, max_position_embeddings=8), torch.arange(3, 15)[None]
    borders = torch.tensor([0, 5, 12])
    with pytest.raises(
        InputError, match="^position_ids: got 'a batch with cu_seq_lens_q alone'; let the collator return"
    ):
        forward_inputs(model, {"input_ids": ids, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders})
    limits = limits_of(model.config, "tiny")
    fits = {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    assert batch_faults(limits, fits, "input_ids") == []
    (fault,) = batch_faults(limits, {"input_ids": ids, "position_ids": torch.arange(12)[None]}, "input_ids")
    assert str(fault).startswith("input_ids: got 'a row of 12 tokens'; accepted: rows of at most 8 tokens")
