"""Every family, each way of collecting: quick backward products, from the first linears on, a few layers at a time."""

import pytest
import torch
from builders.families import EVERY, LAYERS, family_batch, family_model
from builders.grids import layouts_first
from builders.pruning import collect

from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
from distill_llm.pruning.statistics import fast_backward
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.layer_moments import LayerMoments
from distill_llm.pruning.statistics.settings import CalibrationSettings


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    "name", [*layouts_first([*EVERY, "opt-post-norm"]), pytest.param("vit", marks=pytest.mark.slow)]
)
def test_every_way_of_collecting_finds_the_same_of_every_family(name, monkeypatch):
    monkeypatch.setattr(fast_backward, "fast_bf16", lambda device: True)
    model = family_model("opt", do_layer_norm_before=False) if name == "opt-post-norm" else family_model(name)
    batches = [family_batch(model, seed=seed) for seed in range(2)]
    exact = collect(model, batches, "kl", exact=True, hidden_moments=True)
    quick = collect(model, batches, "kl", hidden_moments=True)
    inner = collect(model, batches, "kl", hidden=False)
    by_layer = CalibrationPass(model, "kl", settings=CalibrationSettings(moment_share=1.0))
    assert quick.hidden_moments and not inner.hidden_moments
    for found, tolerance in ((quick, 0.05), (inner, 0.05)):
        for kind in ("heads", "neurons", "queries"):
            for mine, its in zip(getattr(found, kind), getattr(exact, kind), strict=True):
                assert near(mine.fisher, its.fisher, tolerance) and near(mine.taylor, its.taylor, tolerance), kind
        for mine, its in zip(found.moments, exact.moments, strict=True):
            assert all(near(a.second, b.second, tolerance) for a, b in zip(mine, its, strict=True))
    for (mine, moments), (its, others) in zip(quick.hidden_moments, exact.hidden_moments, strict=True):
        assert mine == its and near(moments.second, others.second, 0.05), mine
    for mine, its in zip(LayerMoments(by_layer, lambda: batches, 2), inner.moments, strict=True):
        assert all(near(a.second, b.second, 1e-4) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "bloom", "falcon"])
def test_a_first_layer_without_heads_and_neurons_has_the_effect_of_what_it_still_adds(name, checkpointing):
    """Gradients from the embeddings on, which are taken for channels, are the reference."""
    model = family_model(name)
    rows = keep_layers(model, range(LAYERS)).layers
    student = prune(model, PruningPlan(model.config.model_type, (LayerPlan(0, (), ()), *rows[1:])))
    batches = [family_batch(student)]
    whole, inner = (
        collect_statistics(
            student, batches, "kl", settings=CalibrationSettings(hidden=hidden, exact=True, checkpointing=checkpointing)
        )
        for hidden in (True, False)
    )
    assert (float(whole.layers.fisher[0]) > 0) == (name not in ("llama", "falcon")), "these add nothing"
    for kind in ("layers", "attention", "ffn"):
        torch.testing.assert_close(getattr(inner, kind).fisher, getattr(whole, kind).fisher)
    for mine, its in zip((*inner.heads, *inner.neurons), (*whole.heads, *whole.neurons), strict=True):
        torch.testing.assert_close(mine.taylor, its.taylor)
