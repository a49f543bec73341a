"""Counts against hand arithmetic and torch.utils.flop_counter; times only for their shape, never for their size."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from builders.models import FAMILIES, tiny_model
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from distill_llm.common.errors import InputError
from distill_llm.measuring.clocks import relative_latency
from distill_llm.measuring.counting import (
    count_flops,
    count_params,
    full_length_inputs,
    peak_memory,
    weights_memory,
)
from distill_llm.measuring.profiling import compare, device_name, profile, profile_table
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import full_plan

LAYERS, HIDDEN, HEADS, FFN, VOCAB, POSITIONS, LABELS = 3, 32, 4, 64, 100, 64, 2
B, T = 4, 10


def layer_params(hidden: int = HIDDEN, ffn: int = FFN) -> int:
    """A BERT layer by hand: four square linears, two of the FFN, two layer norms, all with bias."""
    return 4 * (hidden * hidden + hidden) + (hidden * ffn + ffn) + (ffn * hidden + hidden) + 2 * 2 * hidden


def layer_flops(batch: int, length: int, width: int = HIDDEN, ffn: int = FFN, hidden: int = HIDDEN) -> int:
    """A layer by hand; `width` is the summed width of its heads, 0 where no head is left."""
    linears = 4 * hidden * width + 2 * hidden * ffn
    attention = 2 * length * width
    return 2 * batch * length * (linears + attention)


def head_flops(batch: int) -> int:
    """BERT's pooler and classifier, on the first token alone."""
    return 2 * batch * (HIDDEN * HIDDEN + HIDDEN * LABELS)


def test_parameters_equal_hand_arithmetic_for_bert() -> None:
    embeddings = (VOCAB + POSITIONS + 2) * HIDDEN + 2 * HIDDEN
    heads = HIDDEN * HIDDEN + HIDDEN + HIDDEN * LABELS + LABELS
    total, layers = count_params(tiny_model())
    assert layers == LAYERS * layer_params()
    assert total == embeddings + layers + heads


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_the_layers_leave_out_embeddings_and_heads_in_every_family(family: str) -> None:
    assert count_params(tiny_model(family))[1] == LAYERS * layer_params()


def test_tied_parameters_count_once() -> None:
    tied, untied = tiny_model(head="masked-lm"), tiny_model(head="masked-lm", tie_word_embeddings=False)
    decoder_and_its_bias = VOCAB * HIDDEN + VOCAB
    assert count_params(untied)[0] - count_params(tied)[0] == decoder_and_its_bias


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_equal_hand_arithmetic(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    assert count_flops(model, B, T) == LAYERS * layer_flops(B, T) + head_flops(B)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_under_sdpa_equal_what_torch_counts_for_eager_attention(family: str) -> None:
    eager = tiny_model(family, attn_implementation="eager")
    with FlopCounterMode(display=False) as reference, torch.no_grad():
        eager(**full_length_inputs(eager, B, T))
    assert count_flops(tiny_model(family, attn_implementation="sdpa"), B, T) == reference.get_total_flops()


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_flops_of_relative_positions_are_counted_too(norm: str) -> None:
    """DeBERTa: queries and keys by 16 projected positions each, which are projected once for the batch."""
    positions = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "type_vocab_size": 0,
    }
    model = tiny_model("deberta-v2", layers=LAYERS, hidden=HIDDEN, intermediate=FFN, norm_rel_ebd=norm, **positions)
    relative = 2 * (2 * B * T * 16 * HIDDEN + 2 * 16 * HIDDEN * HIDDEN)
    assert count_flops(model, B, T) == LAYERS * (layer_flops(B, T) + relative) + head_flops(B)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_flops_of_grouped_queries_under_sdpa_equal_eager() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    counts = [
        count_flops(AutoModelForCausalLM.from_config(config, attn_implementation=a), B, T) for a in ("eager", "sdpa")
    ]
    assert counts[0] == counts[1] > 0


class NoAttention(nn.Module):
    """What stands where no head is left."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        """Hand the input on."""
        return hidden_states, None


def narrow(model: nn.Module) -> None:
    """By hand: layer 0 loses 2 of 4 heads, layer 1 all of them, layer 2 keeps 24 of 64 neurons."""
    layers, width = model.bert.encoder.layer, HIDDEN // 2
    attention = layers[0].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(HIDDEN, width))
    attention.output.dense = nn.Linear(width, HIDDEN)
    layers[1].attention = NoAttention()
    layers[2].intermediate.dense = nn.Linear(HIDDEN, 24)
    layers[2].output.dense = nn.Linear(24, HIDDEN)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_and_parameters_of_an_unevenly_pruned_model_equal_hand_arithmetic(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    narrow(model)
    layers = layer_flops(B, T, width=HIDDEN // 2) + layer_flops(B, T, width=0) + layer_flops(B, T, ffn=24)
    assert count_flops(model, B, T) == layers + head_flops(B)
    half_of_the_heads = 4 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN // 2
    attention_and_norm = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN
    removed = half_of_the_heads + attention_and_norm + 40 * (2 * HIDDEN + 1)
    assert count_params(model)[1] == LAYERS * layer_params() - removed


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_flops_of_what_prune_makes_equal_hand_arithmetic(family: str) -> None:
    model = tiny_model(family)
    plan = full_plan(model)
    first, second, third = plan.layers
    layers = (
        replace(first, heads=()),
        replace(second, heads=(0, 3), neurons=tuple(range(24))),
        replace(third, neurons=()),
    )
    student = prune(model, replace(plan, layers=layers))
    expected = layer_flops(B, T, width=0) + layer_flops(B, T, width=HIDDEN // 2, ffn=24) + layer_flops(B, T, ffn=0)
    assert count_flops(student, B, T) == expected + head_flops(B)


class Chain(nn.Module):
    """embedding -> linear -> a view -> relu -> linear; enough of a model to follow its tensors by hand."""

    def __init__(self, width: int):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, width), nn.Linear(width, 8)
        self.config, self.device, self.dtype = PreTrainedConfig(), torch.device("cpu"), torch.float32

    def get_input_embeddings(self) -> nn.Embedding:
        """As a transformers model has it."""
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, 8)."""
        x = self.embed(input_ids)
        x = self.up(x)
        x = x.view(-1, x.shape[-1]).relu()
        return self.down(x)


def test_peak_memory_equals_hand_arithmetic_and_counts_views_once() -> None:
    width, rows = 50, B * T
    weights = 4 * (10 * 8 + (8 * width + width) + (width * 8 + 8))
    # Highest at relu: its input and its output; the embedded tokens were let go when `x` was assigned
    peak = 4 * rows * (width + width)
    model = Chain(width)
    assert weights_memory(model) == weights
    assert peak_memory(model, B, T) == weights + peak


def test_peak_memory_is_the_same_every_time_and_smaller_for_the_pruned_model() -> None:
    model, pruned = tiny_model(intermediate=512), tiny_model(intermediate=64)
    first, again = peak_memory(model, B, T), peak_memory(model, B, T)
    # B x T x (neurons after the first linear, then GELU's output): 448 neurons less, twice, in fp32
    assert first == again
    saved = first - weights_memory(model) - (peak_memory(pruned, B, T) - weights_memory(pruned))
    assert saved > 4 * B * T * 448


def test_full_length_inputs_hold_no_padding() -> None:
    model = tiny_model("roberta", pad_token_id=1)
    inputs = full_length_inputs(model, 32, 40)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (32, 40)
    assert (inputs["input_ids"] != 1).all() and (inputs["attention_mask"] == 1).all()


@pytest.mark.parametrize("made", [lambda model: model, lambda model: prune(model, full_plan(model))])
def test_a_multiple_choice_head_reads_as_many_sequences_as_any_other(made) -> None:
    """Against a classifier of one class, which is what its head is."""
    model, other = made(tiny_model(head="multiple-choice")), tiny_model(num_labels=1)
    inputs = full_length_inputs(model, B, T)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (B, 1, T)
    assert count_flops(model, B, T) == count_flops(other, B, T)
    assert profile(model, B, T, repeats=1).peak_memory_mb == pytest.approx(
        profile(other, B, T, repeats=1).peak_memory_mb
    )
    assert relative_latency(model, model, B, T) > 0


def test_profile_has_every_number_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    model.bert.embeddings.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = profile(model, B, T, repeats=5)
    low, high = result.latency_spread_ms
    assert 0 < low <= result.latency_ms <= high
    assert (result.params, result.layer_params) == count_params(model)
    assert result.flops == LAYERS * layer_flops(B, T) + head_flops(B)
    assert result.peak_memory_mb > result.weights_mb > 4 * result.params / 1e6 - 1e-9
    assert (result.batch_size, result.sequence_length, result.dtype) == (B, T, "float32")
    assert model.training and model.bert.encoder.training and not model.bert.embeddings.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compare_pairs_the_times_of_both_models_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_model(layers=1), tiny_model()
    calls = []
    given = {id(student): [0.001, 0.002, 0.004], id(teacher): [0.002, 0.006, 0.004]}

    def timer(model: nn.Module, inputs: object) -> Callable[[], float]:
        def seconds() -> float:
            calls.append("student" if model is student else "teacher")
            return given[id(model)].pop(0) if len(calls) > 6 else 0.0

        return seconds

    monkeypatch.setattr("distill_llm.measuring.profiling._timer", timer)
    result = compare(student, teacher, B, T, repeats=3)
    assert calls[6:] == ["student", "teacher", "teacher", "student", "student", "teacher"]
    # ratios of the pairs: 2, 3, 1
    assert (result.speedup, result.speedup_min, result.speedup_max) == pytest.approx((2, 1, 3))
    assert (result.model.latency_ms, result.other.latency_ms) == pytest.approx((2, 4))
    assert result.model.latency_spread_ms == pytest.approx((1.2, 3.6))


def test_device_is_named_with_its_threads() -> None:
    name = device_name("cpu")
    assert name.endswith(f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1))
    assert len(name.split(",")[0]) > 2


def test_table_shows_one_model_or_two_side_by_side() -> None:
    def text(table: object) -> str:
        out = io.StringIO()
        Console(file=out, width=200).print(table)
        return out.getvalue()

    one = text(profile_table(profile(tiny_model(), B, T, repeats=2), ("tiny", "unused")))
    assert "tiny" in one and "unused" not in one and f"{LAYERS * layer_params():,}" in one and "4 x 10 tokens" in one
    student = tiny_model(layers=1).to(torch.bfloat16)
    two = text(profile_table(compare(student, tiny_model(), B, T, repeats=2), ("student", "teacher")))
    assert "student" in two and "teacher" in two and "speed-up" in two and "0.333" in two
    (line,) = [line.split() for line in two.splitlines() if "dtype" in line]
    assert line.index("bfloat16") < line.index("float32"), "each side's"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((0, 8), "batch_size"), ((2, 0), "sequence_length"), ((2, 65), "sequence_length"), ((2, 8, 0), "repeats")],
)
def test_impossible_sizes_are_refused_in_one_line(arguments: tuple[int, ...], field: str) -> None:
    options = {"repeats": arguments[2]} if len(arguments) > 2 else {}
    with pytest.raises(InputError, match=f"^{field}: got") as error:
        profile(tiny_model(), *arguments[:2], **options)
    assert "\n" not in str(error.value)


def test_roberta_has_fewer_positions_than_rows_in_its_table() -> None:
    model = tiny_model("roberta", pad_token_id=1)
    count_flops(model, 1, 62)
    with pytest.raises(InputError, match="at most 62"):
        count_flops(model, 1, 63)
