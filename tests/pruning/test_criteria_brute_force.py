"""Ranks of every kind of unit against brute force: each unit is removed, and the change of every example's loss measured."""

from dataclasses import replace

import pytest
import torch
from builders.families import DECODERS, HIDDEN, QUERIES, family_model
from builders.grids import slow
from builders.models import random_batch
from scipy.stats import spearmanr
from torch.nn import functional as F

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import score
from distill_llm.pruning.names import UNITS
from distill_llm.pruning.plan import full_plan
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.sizes import counts_of

TAPS = {
    "bert": ("attention.output.dense", "output.dense"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


READERS = {
    "bert": [*(f"attention.self.{x}" for x in ("query", "key", "value")), "intermediate.dense"],
    "llama": [*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj"],
    "gpt2": ["attn.c_attn", "mlp.c_fc"],
}


AFTER = {"bert": ["bert.pooler.dense", "classifier"], "llama": ["lm_head"], "gpt2": ["lm_head"]}


@pytest.fixture(scope="module", params=TAPS)
def small_parts(request):
    """A model whose layers add little each to the residual stream, so that second order holds; its batch and statistics."""
    neurons = {"n_inner": 8} if request.param == "gpt2" else {"intermediate_size": 8}
    model = family_model(request.param, num_hidden_layers=8, **neurons)
    with torch.no_grad():
        for layer in layers_of(model):
            for path in TAPS[request.param]:
                layer.get_submodule(path).weight *= 0.01
    batch = random_batch(model, batch=16, length=12, padded=False, labels=request.param == "bert")
    batch.setdefault("labels", batch["input_ids"])
    return request.param, model, batch, collect_statistics(model, [batch], settings=CalibrationSettings(exact=True))


def sums_of_losses(model, batch) -> torch.Tensor:
    """(B,): the sum over an example's predictions of their cross-entropies."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, batch["labels"], reduction="none")
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)


def zeroed(modules, start, size):
    """Hooks that zero some channels of what goes into modules."""

    def mask(module, args):
        values = args[0].clone()
        values[..., start : start + size] = 0
        return (values, *args[1:])

    return [module.register_forward_pre_hook(mask) for module in modules]


def without_each(family, model, batch, kind) -> torch.Tensor:
    """(units, B): the losses without each unit alone, zeroed by hand where it enters linears.

    Layers are pruned; of "channels", the whole channel is.
    """
    whole, found = full_plan(model), []
    if kind in ("layers", "channels"):
        plans = [replace(whole, layers=tuple(row for row in whole.layers if row.source != i)) for i in range(8)]
        if kind == "channels":
            plans = [replace(whole, hidden=tuple(c for c in range(HIDDEN) if c != j)) for j in range(HIDDEN)]
        return torch.stack([sums_of_losses(prune(model, plan), batch) for plan in plans])
    places = [[layer.get_submodule(TAPS[family][kind in ("neurons", "ffn")])] for layer in layers_of(model)]
    if kind == "hidden":
        inside = [layer.get_submodule(path) for layer in layers_of(model) for path in READERS[family]]
        places = [[*inside, *map(model.get_submodule, AFTER[family])]]
    groups, every = counts_of(model)[0]["heads"], 8 if kind in ("neurons", "ffn") else HIDDEN
    size = {"heads": HIDDEN // groups, "queries": HIDDEN // QUERIES, "neurons": 1, "hidden": 1}.get(kind, every)
    for modules in places:
        for start in range(0, every, size):
            hooks = zeroed(modules, start, size)
            found.append(sums_of_losses(model, batch))
            for hook in hooks:
                hook.remove()
    return torch.stack(found)


# Least rank correlations; the rest have to have 0.97. The score of a channel takes it from all that linears read ("hidden"). That
# with the whole channel gone ("channels") norms give the others more is not in it.
LEAST = {"attention": 0.9, "ffn": 0.9, "layers": 0.85, "hidden": 0.9}


LEAST_OF_CHANNELS = {"bert": 0.85, "llama": 0.8, "gpt2": 0.9}


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", [*UNITS, "channels"])
def test_fisher_and_taylor_rank_every_kind_of_unit_as_brute_force_does(small_parts, kind):
    """Every unit alone is removed and the change of each example's loss measured; the rank correlations show with `-rP`."""
    family, model, batch, statistics = small_parts
    if kind == "queries" and family != "llama":
        pytest.skip("no queries share a key")
    change = without_each(family, model, batch, kind) - sums_of_losses(model, batch)
    least = LEAST_OF_CHANNELS[family] if kind == "channels" else LEAST.get(kind, 0.97)
    for criterion, measured in (("fisher", change.square().mean(1)), ("taylor", change.abs().mean(1))):
        found = getattr(score(statistics, criterion), "hidden" if kind == "channels" else kind)
        values = torch.cat(found) if isinstance(found, tuple) else found
        assert len(values) == len(measured)
        correlation = spearmanr(values, measured).statistic
        print(f"{family}, {kind}, {criterion}: rank correlation {correlation:.3f} over {len(values)} units")
        assert correlation > least
        ratio = float(values.sum() / measured.sum())
        if kind == "hidden":
            assert 0.5 < ratio < 2, "as dear as heads and neurons are"
        elif kind != "channels":
            assert ratio == pytest.approx(1, rel=0.1), "not in order only"


# Norms of the layers that what these add to the residual stream comes through.
WRITERS = dict.fromkeys(("olmo2", "gemma2", "gemma3_text"), ("post_attention_layernorm", "post_feedforward_layernorm"))


@pytest.mark.parametrize(
    "family", ["gemma2", *slow("roberta", "olmo2", "gemma3_text", "cohere", "modernbert", "deberta-v2")]
)
def test_channels_are_ranked_as_brute_force_does_wherever_a_family_has_its_norms(family):
    """On the way into the stream, before the linears that read it, or round the stream itself."""
    model = family_model(family, num_hidden_layers=8, intermediate_size=8)
    rows = family_of(model)
    with torch.no_grad():
        for layer in layers_of(model):
            for path in WRITERS.get(family, (rows.attention_out, rows.ffn_out)):
                weight = layer.get_submodule(path).weight
                weight.copy_((weight + 1) * 0.05 - 1 if "gemma" in family else weight * 0.05)
    batch = random_batch(model, batch=16, length=12, padded=False, labels=family not in DECODERS)
    batch.setdefault("labels", batch["input_ids"])
    change = without_each(family, model, batch, "channels") - sums_of_losses(model, batch)
    statistics = collect_statistics(model, [batch], settings=CalibrationSettings(exact=True))
    for criterion, measured in (("fisher", change.square().mean(1)), ("taylor", change.abs().mean(1))):
        correlation = spearmanr(score(statistics, criterion).hidden, measured).statistic
        print(f"{family}, {criterion}: rank correlation {correlation:.3f}")
        assert correlation > 0.7
