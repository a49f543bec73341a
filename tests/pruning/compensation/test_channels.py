"""Compensation of removed channels of the residual stream: what reads it, what its norms make of fewer channels, and the gain."""

from dataclasses import replace

import pytest
import torch
from builders.families import EVERY, HIDDEN, family_batch, family_model, outputs_of, uneven_plan
from builders.grids import layouts_first, slow
from torch import nn

from distill_llm.architectures.modeling_pruned import hidden_dims
from distill_llm.common.errors import InputError
from distill_llm.pruning.compensation.channels import rescaled_norm
from distill_llm.pruning.cutting.surgery import prune, stock_expressible
from distill_llm.pruning.plan import full_plan
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.moments import RIDGE, MomentsSum
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.residual_stream import stream_norms, stream_tensors
from distill_llm.pruning.statistics.settings import CalibrationSettings

HALF = HIDDEN // 2
LESS = ("llama", "gpt2", "deberta-v2-convolution")
"""Families that a test takes at once, and one whose convolution reads channels of neighbours."""


def collect(model, count=6, loss="kl", **options) -> Statistics:
    batches = [family_batch(model, 8, 20, seed=seed) for seed in range(count)]
    settings = CalibrationSettings(hidden_moments=True, moment_share=1.0, **options)
    return collect_statistics(model, batches, loss, settings=settings)


def keeping(model, channels):
    return replace(full_plan(model), hidden=tuple(channels))


def error(student, model) -> float:
    """The mean squared error of outputs on data that no statistics are of."""
    batch = family_batch(model, 8, 20, seed=99)
    dense = outputs_of(model, batch)
    return float((outputs_of(student, batch) - dense).square().mean() / dense.square().mean())


READ = {
    "bert": [
        ("bert.embeddings.LayerNorm", [f"bert.encoder.layer.0.attention.self.{x}" for x in ("query", "key", "value")]),
        ("bert.encoder.layer.0.attention.output.LayerNorm", ["bert.encoder.layer.0.intermediate.dense"]),
        ("bert.encoder.layer.0.output.LayerNorm", ["bert.pooler.dense"]),
        ("", ["classifier"]),
    ],
    "llama": [
        ("model.layers.0.input_layernorm", [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]),
        ("model.layers.0.post_attention_layernorm", [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")]),
        ("model.norm", ["lm_head"]),
    ],
    "olmo2": [
        ("", [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]),
        ("model.layers.0.post_attention_layernorm", []),
        ("", [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")]),
        ("model.layers.0.post_feedforward_layernorm", []),
        ("model.norm", ["lm_head"]),
    ],
    "gpt2": [
        ("transformer.h.0.ln_1", ["transformer.h.0.attn.c_attn"]),
        ("transformer.h.0.ln_2", ["transformer.h.0.mlp.c_fc"]),
        ("transformer.ln_f", []),  # the head is the table of embeddings
    ],
}


@pytest.mark.parametrize("name", READ)
def test_linears_that_read_the_same_tensor_share_it_with_the_norm_that_gives_it_out(name):
    model = family_model(name, num_hidden_layers=1)
    found = stream_tensors(model, family_batch(model))
    assert [(norm, list(readers)) for norm, readers in found] == READ[name]


def doubled(name, factor):
    """A model whose stream's second half is always `factor` times the first."""
    model = family_model(
        name, **({"tie_word_embeddings": False} if name == "gpt2" else {})
    )  # a tied head takes over nothing
    with torch.no_grad():
        for name, dims in hidden_dims(model).items():
            parameter, module = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
            writes = 1 if isinstance(module, nn.Embedding) else int("c_proj" in name and parameter.dim() > 1)
            norm = "Norm" in type(module).__name__
            if writes not in dims or (norm and model.config.model_type != "bert"):
                continue  # a reader's columns and, before readers, a norm's weights are free
            halves = parameter.unflatten(writes, (2, HALF)).transpose(0, writes)
            halves[1] = halves[0] * (1 if norm else factor)
    return model


@pytest.mark.parametrize(("name", "factor"), [("bert", 1), ("llama", -0.5), ("gpt2", 1), *slow(("llama", 2))])
def test_channels_that_follow_from_the_kept_ones_are_removed_without_loss(name, factor):
    """RMS norms over half of such a stream are off by the same factor in every token."""
    model = doubled(name, factor)
    plan = keeping(model, range(HALF))
    assert error(prune(model, plan), model) > 0.1
    assert error(prune(model, plan, collect(model), ridge=1e-9), model) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", *slow(*(name for name in EVERY if name not in LESS))])
def test_removed_channels_cost_less_in_every_family(name):
    model = family_model(name)
    statistics, plan = collect(model, 20), keeping(model, (c for c in range(HIDDEN) if c % 8))
    plain, better = (prune(model, plan, each) for each in (replace(statistics, hidden_moments=()), statistics))
    assert error(better, model) < error(plain, model)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma2", "cohere"])
def test_the_weights_solve_the_least_squares_of_what_readers_see(name):
    """By hand, from the norms' outputs: of every valid token, and with the ridge as further rows."""
    model = family_model(name)
    batch = family_batch(model, 8, 20)
    statistics = collect_statistics(
        model, [batch], None, settings=CalibrationSettings(hidden_moments=True, moment_share=1.0)
    )
    tensors = {
        readers[0]: norm for norm, readers in (tensor for tensor, _ in statistics.hidden_moments) if norm and readers
    }
    reader, norm = next(iter(tensors.items()))
    seen = []
    handle = model.get_submodule(norm).register_forward_hook(lambda m, a, o: seen.append(o))
    outputs_of(model, batch)
    handle.remove()
    x = seen[0][batch["attention_mask"].bool()].double()
    kept = torch.tensor([c for c in range(HIDDEN) if c % 5])
    gone = torch.tensor([c for c in range(HIDDEN) if c % 5 == 0])
    old, new = (
        model.get_submodule(reader),
        prune(model, keeping(model, kept.tolist()), statistics).get_submodule(reader),
    )
    columns, made = ((m.weight.T if "c_" in reader else m.weight).detach().double() for m in (old, new))
    constant = torch.ones(len(x), int(old.bias is not None), dtype=torch.float64)
    ridge = (RIDGE * x.square().mean() * len(x)).sqrt() * torch.eye(len(kept), len(kept) + constant.shape[1])
    rows, target = torch.cat([torch.cat([x[:, kept], constant], 1), ridge]), x[:, gone] @ columns[:, gone].T
    solved = torch.linalg.lstsq(rows, torch.cat([target, torch.zeros(len(kept), target.shape[1]).double()])).solution
    torch.testing.assert_close(made, columns[:, kept] + solved[: len(kept)].T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "cohere"])
def test_a_norm_over_fewer_channels_comes_out_as_over_all_in_the_mean(name):
    """Against the regression, with a constant where there is a bias, of what all channels give on what the kept ones do."""
    model = family_model(name)
    path = next(iter(stream_norms(model)))
    norm, kept = model.get_submodule(path), torch.arange(HALF)  # those that are small
    torch.manual_seed(0)
    x = torch.randn(4000, HIDDEN) * torch.linspace(0.5, 2, HIDDEN) + torch.linspace(0, 1, HIDDEN).roll(5)
    with torch.no_grad():
        full = norm(x)
    total = MomentsSum(HIDDEN, x.device, 1.0)
    total.add(full)
    weight, bias = rescaled_norm(norm, total.finish(), kept)
    small = family_model(name, hidden_size=HALF).get_submodule(path) if name != "bert" else nn.LayerNorm(HALF)
    small.weight = nn.Parameter(norm.weight.detach()[kept])
    if bias is not None:
        small.bias = nn.Parameter(norm.bias.detach()[kept])
    with torch.no_grad():
        far = float((small(x[:, kept]) - full[:, kept]).square().mean())
        small.weight = nn.Parameter(weight)
        if bias is not None:
            small.bias = nn.Parameter(bias)
        near = float((small(x[:, kept]) - full[:, kept]).square().mean())
    assert near < 0.5 * far


def test_the_bias_of_a_narrower_layer_norm_takes_the_mean_that_all_channels_give():
    """By hand: the kept channels lie above the others, so that their own mean, which the norm takes away, is far from zero."""
    norm, kept = nn.LayerNorm(16), torch.arange(8)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.uniform_(-1.0, 1.0)
        x = torch.randn(500, 16) + torch.tensor([3.0] * 8 + [-3.0] * 8)
        full = norm(x)
    total = MomentsSum(16, x.device, 1.0)
    total.add(full)
    weight, bias = rescaled_norm(norm, total.finish(), kept)
    z = ((full - norm.bias) / norm.weight)[
        :, kept
    ].double()  # what all channels make of the kept ones, before weight and bias
    middle = z.mean()
    assert middle > 0.5
    torch.testing.assert_close(bias.double(), (norm.bias + norm.weight * middle)[kept].double(), rtol=1e-4, atol=1e-4)
    spread = (z.square().mean() - (z.mean(1) ** 2).mean()).sqrt()
    torch.testing.assert_close(weight.double(), norm.weight[kept].double() * spread, rtol=1e-4, atol=1e-4)
    # The regression of what all channels give on what the kept ones alone make: its constant is the bias, in the mean.
    alone = nn.functional.layer_norm(x[:, kept], (8,)).double()
    for channel in range(8):
        rows = torch.stack([alone[:, channel], torch.ones(len(x), dtype=torch.float64)], 1)
        slope, constant = torch.linalg.lstsq(rows, full[:, channel : channel + 1].double()).solution.flatten()
        at_mean = slope * alone[:, channel].mean() + constant
        own = weight[channel] * alone[:, channel].mean() + bias[channel]
        assert abs(at_mean - own) < 0.25 * abs(norm.weight[channel] * middle)


def test_moments_of_the_stream_survive_a_file(tmp_path):
    model = family_model("llama", num_hidden_layers=12)
    statistics = collect(model, 2)
    assert len(statistics.hidden_moments) == 25
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    for (mine, its), (name, other) in zip(statistics.hidden_moments, loaded.hidden_moments, strict=True):
        assert mine == name
        assert torch.equal(its.mean, other.mean) and torch.equal(its.second, other.second)
    assert collect_statistics(model, [family_batch(model)], "kl").hidden_moments == ()


@pytest.mark.parametrize("name", layouts_first(EVERY))
def test_layers_of_other_sizes_and_removed_ones_take_their_part(name):
    model = family_model(name)
    statistics, plan = collect(model, 4), uneven_plan(model, hidden=True)
    plain, better = (prune(model, plan, each) for each in (replace(statistics, hidden_moments=()), statistics))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in better.parameters()]
    assert outputs_of(better, family_batch(model)).isfinite().all()


@pytest.mark.grid(1)
@pytest.mark.parametrize("loss", ["kl", None])
@pytest.mark.parametrize("name", ["bert", "olmo2"])
def test_checkpointed_layers_give_the_same_moments(name, loss):
    model = family_model(name)
    plain, saving = (collect(model, 2, loss, exact=True, checkpointing=each) for each in (False, True))
    for (mine, its), (tensor, other) in zip(plain.hidden_moments, saving.hidden_moments, strict=True):
        assert mine == tensor
        torch.testing.assert_close(its, other, rtol=1e-4, atol=1e-5)


def test_a_student_that_a_stock_config_can_say_stays_stock_and_no_weight_is_shared(tmp_path):
    model = family_model("llama")
    student = prune(model, keeping(model, range(8, 32)), collect(model, 2))
    assert stock_expressible(student)
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not memory & {p.untyped_storage().data_ptr() for p in student.parameters()}
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, family_batch(model)), outputs_of(student, family_batch(model)))


def test_statistics_of_another_model_are_refused():
    model = family_model("llama")
    statistics = collect(model, 1)
    other = replace(statistics, hidden_moments=collect(family_model("gpt2"), 1).hidden_moments)
    with pytest.raises(InputError, match="statistics of the model that is pruned"):
        prune(model, keeping(model, range(16)), other)
