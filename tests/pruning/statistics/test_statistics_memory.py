"""What a calibration pass holds in memory."""

import pytest
import torch
from builders.families import family_batch, family_model
from builders.pruning import Held, assert_close, processor_with_bf16

from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings


@pytest.mark.grid(1)
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_checkpointing_finds_the_same_and_holds_less(name, hidden):
    model = family_model(name, num_hidden_layers=12)
    batches = [family_batch(model, seed=seed, left=name != "bert" and seed == 1) for seed in range(2)]
    for batch in batches:
        batch["labels"] = torch.tensor([0, 2, 1])
        if name != "bert":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain, saving = (
        collect_statistics(model, batches, settings=CalibrationSettings(exact=True, hidden=hidden, checkpointing=each))
        for each in (False, True)
    )
    for kind in ("heads", "neurons", "queries"):
        for mine, its in zip(getattr(saving, kind), getattr(plain, kind), strict=True):
            assert_close(vars(mine), vars(its))
    for kind in ("layers", "attention", "ffn", "hidden"):
        assert_close(vars(getattr(saving, kind)), vars(getattr(plain, kind)))
    for mine, its in zip(saving.moments, plain.moments, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saving.similarity, plain.similarity)
    assert all("forward" not in vars(module) for module in model.modules())
    bytes_held, long = [], {n: v if v.dim() == 1 else v.repeat(4, 4) for n, v in batches[0].items() if n != "labels"}
    long["labels"] = batches[0]["labels"].repeat(4, *[4] * (batches[0]["labels"].dim() - 1))
    for each in (False, True):
        with Held([*model.parameters(), *long.values()]) as live:
            collect_statistics(
                model,
                [long],
                settings=CalibrationSettings(moments=False, exact=True, hidden=hidden, checkpointing=each),
            )
        bytes_held.append(live.peak)
    assert bytes_held[1] < 0.6 * bytes_held[0]


def test_quick_products_hold_a_copy_of_one_weight_at_a_time(monkeypatch):
    processor_with_bf16(monkeypatch, True)
    model = family_model("llama", num_hidden_layers=12, hidden_size=64, intermediate_size=256)
    batch, peaks = family_batch(model, batch=2, length=4), []
    for exact in (True, False):
        with Held([*model.parameters(), *batch.values()]) as live:
            collect_statistics(model, [batch], "kl", settings=CalibrationSettings(moments=False, exact=exact))
        peaks.append(live.peak)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.model.layers.parameters())
    assert peaks[1] - peaks[0] < 0.05 * weights
