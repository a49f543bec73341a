"""Names of modules, plans and references that the pruning tests share; nothing here is taken from the code under test."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from builders.families import IMAGES, family_batch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill_llm.measuring.live import LiveStorages
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings

# Inside a layer: query, key, value, attention output, FFN up, FFN down.
BERT_NAMES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
DISTILBERT_NAMES = (
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
)
UNEVEN = ((0, (1, 3), range(5, 40)), (1, (), range(0, 64, 3)), (3, range(4), ()), (4, (2,), (7, 8, 63)))
"""A plan for five layers of 4 heads and 64 neurons: layer 2 is gone, layer 1 has no attention, layer 3 no FFN."""


def names_of(model: nn.Module) -> tuple[str, ...]:
    """Paths inside a layer of this model."""
    return DISTILBERT_NAMES if model.config.model_type == "distilbert" else BERT_NAMES


def layers_in(model: nn.Module) -> nn.ModuleList:
    """The transformer layers of this model."""
    base = model.base_model
    return base.transformer.layer if model.config.model_type == "distilbert" else base.encoder.layer


def linears_in(model: nn.Module) -> list[tuple[nn.Linear, nn.Linear]]:
    """Attention-output and FFN-down linear of every layer."""
    names = names_of(model)
    return [(layer.get_submodule(names[3]), layer.get_submodule(names[5])) for layer in layers_in(model)]


def plan_of(model: nn.Module, rows=UNEVEN) -> PruningPlan:
    """A plan from (source, heads, neurons) rows."""
    return PruningPlan(model.config.model_type, tuple(LayerPlan(i, tuple(h), tuple(n)) for i, h, n, *_ in rows))


def counts(heads: float, neurons: float, shared: float = 1) -> dict[str, float]:
    """Numbers of units of a layer, `shared` queries in every group."""
    return {"heads": heads, "neurons": neurons, "queries": heads * shared}


def without(model: nn.Module, layer: int, kind: str, unit: int = 0) -> PruningPlan:
    """The plan that removes one head or neuron of a layer, or the layer."""
    rows = []
    for i, (attention, ffn) in enumerate(linears_in(model)):
        heads = list(range(attention.in_features * model.config.num_attention_heads // model.config.hidden_size))
        neurons = list(range(ffn.in_features))
        if i == layer and kind == "layers":
            continue
        if i == layer:
            (heads if kind == "heads" else neurons).remove(unit)
        rows.append((i, heads, neurons))
    return plan_of(model, rows)


def collect(model: nn.Module, batches, loss="labels", teacher=None, **settings) -> Statistics:
    """Statistics, with settings by their names; second moments are of all tokens unless `moment_share` says otherwise."""
    return collect_statistics(model, batches, loss, teacher, CalibrationSettings(**{"moment_share": 1.0, **settings}))


def random_scores(counts, criterion: str = "fisher", seed: int = 0) -> Importance:
    """Scores for layers with so many units, all different; a head is worth what its 16 times as many parameters are."""
    generator = torch.Generator().manual_seed(seed)
    return Importance(
        criterion,
        tuple(16 * torch.rand(heads, generator=generator) for heads in (each["heads"] for each in counts)),
        tuple(torch.rand(neurons, generator=generator) for neurons in (each["neurons"] for each in counts)),
        torch.rand(len(counts), generator=generator),
    )


def layer_params(model: nn.Module) -> int:
    """Parameters of the transformer layers, counted."""
    return sum(parameter.numel() for parameter in layers_in(model).parameters())


def flops_of(model, tokens: int, batch: int = 1) -> int:
    """Multiply-adds x 2 of the layers, counted by torch while the model runs with frozen weights."""
    inputs, count = {"input_ids": torch.full((batch, tokens), 5)}, model.config.num_hidden_layers
    if model.config.model_type in IMAGES:  # they have as many tokens as their size gives
        inputs = {"pixel_values": family_batch(model, batch)["pixel_values"]}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.requires_grad_(False)(**inputs)
    counts = counter.get_flop_counts()
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = f"{type(model).__name__}.{next(name for name, module in lists if len(module) == count)}"
    return sum(sum(counts.get(f"{layers}.{i}", {}).values()) for i in range(count))


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the context, the last input of every module (by its place in the list)."""
    seen: dict[int, torch.Tensor] = {}

    def hook_of(place: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[place] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [m.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, m in enumerate(modules)]
    yield seen
    for handle in handles:
        handle.remove()


class Held(LiveStorages):
    """Bytes of tensors, but for those on the meta device, which hold nothing."""

    def _follow(self, storage):
        if storage.device.type != "meta":
            super()._follow(storage)


def assert_close(mine: dict[str, torch.Tensor], its: dict[str, torch.Tensor]) -> None:
    """Statistics of units, field by field."""
    for field, values in mine.items():
        torch.testing.assert_close(values, its[field], rtol=1e-4, atol=1e-6, msg=field)


def processor_with_bf16(monkeypatch, answer: bool) -> None:
    """Let the processor seem to multiply fast in bf16, or not."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: answer)


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Products in fp32, unless a test asks for bf16."""
    processor_with_bf16(monkeypatch, False)


@pytest.fixture(scope="module", autouse=True)
def fp32_for_module_fixtures():
    """The same for what a module's fixtures compute."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        processor_with_bf16(monkeypatch, False)
        yield
