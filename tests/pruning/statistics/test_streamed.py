"""Models that compute on another device, the weights of one layer there at a time. Here both are the processor."""

import pytest
import torch
from builders.families import family_batch, family_model
from builders.pruning import Held, assert_close, processor_with_bf16

from distill_llm import fit_bypasses, keep_layers, prune
from distill_llm.architectures.families import layers_of
from distill_llm.common.errors import InputError
from distill_llm.models.placement import streamed
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.layer_moments import LayerMoments
from distill_llm.pruning.statistics.settings import CalibrationSettings

ELSEWHERE = torch.device("cpu:0")


def batches_of(model, name):
    batches = [family_batch(model, seed=seed) for seed in range(2)]
    for batch in batches:
        batch["labels"] = torch.tensor([0, 2, 1])
        if name != "bert":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batches


def state_of(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors}


@pytest.mark.grid(1)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "gpt_neox", "olmo2"])
def test_statistics_are_the_same_and_the_model_stays_where_it_was(monkeypatch, name, exact):
    processor_with_bf16(monkeypatch, True)
    model = family_model(name)
    batches, before = batches_of(model, name), state_of(model)
    options = {"checkpointing": True, "exact": exact, "hidden_moments": True}
    here, there = (
        collect_statistics(model, batches, settings=CalibrationSettings(device=device, **options))
        for device in (None, ELSEWHERE)
    )
    for kind in ("heads", "neurons", "queries"):
        for mine, its in zip(getattr(there, kind), getattr(here, kind), strict=True):
            assert_close(vars(mine), vars(its))
    for kind in ("layers", "attention", "ffn", "hidden"):
        assert_close(vars(getattr(there, kind)), vars(getattr(here, kind)))
    for mine, its in zip(there.moments, here.moments, strict=True):
        torch.testing.assert_close(mine, its)
    assert state_of(model) == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_one_layers_weights_are_there_at_a_time():
    model = family_model("llama", num_hidden_layers=16, tie_word_embeddings=True)
    batches = batches_of(model, "llama")[:1]
    layer = sum(p.numel() * p.element_size() for p in layers_of(model)[0].parameters())
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - 16 * layer
    peaks = []
    for device in (None, ELSEWHERE):
        with Held([*model.parameters(), *batches[0].values()]) as live:
            collect_statistics(
                model,
                batches,
                settings=CalibrationSettings(device=device, checkpointing=True, moments=False, exact=True),
            )
        peaks.append(live.peak)
    assert rest < peaks[1] - peaks[0] < rest + 2 * layer


def test_second_moments_and_bypasses_are_the_same(monkeypatch):
    model = family_model("llama")
    batches = batches_of(model, "llama")
    plan = keep_layers(model, [0, 1, 3, 4])
    found = []
    for device in (None, ELSEWHERE):
        calibration = CalibrationPass(
            model, settings=CalibrationSettings(checkpointing=True, exact=True, device=device)
        )
        moments = list(LayerMoments(calibration, lambda: batches, 2))
        found.append(
            (
                moments,
                prune(
                    model,
                    plan,
                    bypasses=fit_bypasses(model, plan, batches, settings=CalibrationSettings(device=device)),
                ),
            )
        )
    torch.testing.assert_close(found[1][0], found[0][0])
    for mine, its in zip(found[1][1].parameters(), found[0][1].parameters(), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_model_generates_as_before():
    model = family_model("gemma2")
    inputs = {k: v[:1, :4] for k, v in batches_of(model, "gemma2")[0].items() if k != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with streamed(model, layers_of(model), ELSEWHERE):
        assert model.lm_head.weight is model.get_input_embeddings().weight, "tied weights have one copy"
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_gradients_without_checkpointing_would_hold_every_layer():
    model = family_model("llama")
    with pytest.raises(InputError, match="checkpointing: got False; accepted: true: on another device"):
        collect_statistics(model, batches_of(model, "llama"), settings=CalibrationSettings(device=ELSEWHERE))
