"""Pruning a decoder without training, beside plain criteria and other toolkits: every student has as many parameters as ours,
as nearly as possible.

A share of all parameters goes. All sides see the same calibration rows, and perplexity is that of documents after those:

- ours: Fisher over KV groups and FFN neurons together, compensated; also in small cuts, with statistics of the same rows anew
  after each, and FFN neurons alone.
- plain: our criteria without compensation, KV groups and FFN neurons, ranked over all layers or the same share of each.
- layers: block influence (ShortGPT's criterion), with or without the FFN before a removed layer taking it over.
- torch-pruning: Taylor importance of FFN neurons, ranked within each layer or over all. (It does not do heads that share
  keys: its search for their groups does not end.)
- OptiPFair: FFN neurons by weights and activations, by weights alone, and its layer importance.

A side that fails is left out, and its first error is printed.

    python scripts/bench/peers_causal.py --model DIR --text FILE      # DIR: made by scripts/data/smollm2.py
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from recovery import perplexity, rows_of
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill_llm import CalibrationSettings, Statistics, collect_statistics, fit_bypasses, plan_pruning, prune, score
from distill_llm.architectures.families import layers_of
from distill_llm.data.causal import CausalCollator
from distill_llm.measuring.counting import count_params
from distill_llm.pruning.units.costs import unit_costs

Batches = Sequence[dict[str, torch.Tensor]]
PLAIN = ("fisher", "taylor", "wanda", "activation", "magnitude", "random")


def ours(model: PreTrainedModel, batches: Batches, keep: float, statistics: Statistics) -> Iterator[tuple[str, Any]]:
    """Compensated, at once and in five cuts."""
    scores = score(statistics, "fisher")
    yield "ours: fisher, compensated", lambda: prune(model, plan_pruning(model, scores, keep), statistics)
    neurons = plan_pruning(model, scores, keep, units=("neurons",))
    yield "ours: the same, neurons alone", lambda: prune(model, neurons, statistics)

    def in_cuts() -> PreTrainedModel:
        student, left, cuts = model, 1.0, 5
        for number in range(1, cuts + 1):
            share = 1 - (1 - keep) * number / cuts
            found = collect_statistics(
                student, batches, settings=CalibrationSettings(hidden=False, moment_share=1.0, precision=torch.bfloat16)
            )
            student = prune(student, plan_pruning(student, score(found, "fisher"), share / left), found)
            left = share
        return student

    yield "ours: fisher, compensated, 5 cuts", in_cuts


def plain(model: PreTrainedModel, batches: Batches, keep: float, statistics: Statistics) -> Iterator[tuple[str, Any]]:
    """Criteria without compensation, and whole layers."""
    for name, scope in product(PLAIN, ("global", "local")):
        yield (
            f"plain {name}, {scope}",
            lambda name=name, scope=scope: prune(
                model, plan_pruning(model, score(statistics, name), keep, scope=scope)
            ),
        )
    layers = plan_pruning(model, score(statistics, "block_influence"), keep, units=("layers",))
    yield "layers by block influence", lambda: prune(model, layers)
    yield (
        "layers by block influence, taken over",
        lambda: prune(model, layers, bypasses=fit_bypasses(model, layers, batches)),
    )


def torch_pruning(model: PreTrainedModel, batches: Batches, keep: float, params: int) -> Iterator[tuple[str, Any]]:
    """Taylor importance, with gradients summed over the calibration rows."""
    from torch_pruning.pruner import BasePruner, importance

    source = copy.deepcopy(model)
    for batch in batches:
        source(**batch).loss.backward()
    gradients = {name: each.grad for name, each in source.named_parameters() if each.grad is not None}
    whole = unit_costs(model).neuron * model.config.intermediate_size * model.config.num_hidden_layers

    def student(over_layers: bool, ratio: float) -> PreTrainedModel:
        pruned = copy.deepcopy(model)
        pruned.config.use_cache = False
        for name, gradient in gradients.items():
            pruned.get_parameter(name).grad = gradient.clone()
        roots = [root for layer in layers_of(pruned) for root in (layer.mlp.gate_proj, layer.mlp.up_proj)]
        others = [m for m in pruned.modules() if not list(m.children()) and not any(m is each for each in roots)]
        example = {"input_ids": batches[0]["input_ids"][:1, :16]}
        pruner = BasePruner(
            pruned,
            example,
            importance.GroupTaylorImportance(),
            global_pruning=over_layers,
            pruning_ratio=ratio,
            ignored_layers=others,
        )
        pruner.step()
        pruned.zero_grad()
        return pruned

    def method(over_layers: bool) -> PreTrainedModel:
        best, ratio = None, (count_params(model)[1] - params) / whole
        for _ in range(4):
            found = student(over_layers, ratio)
            count = count_params(found)[1]
            if best is None or abs(count - params) < abs(best[1] - params):
                best = found, count
            if abs(count - params) < 1e-3 * params:
                break
            ratio = min(max(ratio + (count - params) / whole, 0.0), 1.0)
            del found
            gc.collect()  # its dependency graph is a cycle that holds the model
        assert best is not None
        return best[0]

    yield "torch-pruning Taylor, local", lambda: method(False)
    yield "torch-pruning Taylor, global", lambda: method(True)


def optipfair(model: PreTrainedModel, batches: Batches, keep: float, params: int) -> Iterator[tuple[str, Any]]:
    """The same share of every layer's neurons, and the least important layers."""
    from optipfair import prune_model
    from optipfair.pruning.depth import analyze_layer_importance

    whole = unit_costs(model).neuron * model.config.intermediate_size * model.config.num_hidden_layers
    percentage = 100 * (count_params(model)[1] - params) / whole
    neurons = {"pruning_type": "MLP_GLU", "neuron_selection_method": "MAW", "pruning_percentage": percentage}
    data = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    def run(**options: Any) -> PreTrainedModel:
        with contextlib.redirect_stdout(io.StringIO()):
            return prune_model(copy.deepcopy(model), show_progress=False, **options)

    yield "OptiPFair, weights and activations", lambda: run(**neurons, dataloader=data)
    yield "OptiPFair, weights", lambda: run(**neurons)

    def depth() -> PreTrainedModel:
        found = analyze_layer_importance(copy.deepcopy(model), data, show_progress=False)
        count = len(layers_of(model)) - params // (count_params(model)[1] // len(layers_of(model)))
        return run(pruning_type="DEPTH", layer_indices=sorted(sorted(found, key=found.__getitem__)[:count]))

    yield "OptiPFair, layers", depth


def main() -> None:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--removed", type=float, default=0.2, help="share of all parameters")
    parser.add_argument("--rows", type=int, default=80, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration row")
    parser.add_argument("--only", default="", help="only sides whose names begin with this")
    parser.add_argument("--evaluation-rows", type=int, default=16, help="evaluation rows, each of twice as many tokens")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with Path(options.text).open() as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 1000)]
    half, collate = len(texts) // 2, CausalCollator(tokenizer)
    unseen = rows_of(texts[half:], tokenizer, 2 * options.length, options.evaluation_rows)
    rows = rows_of(texts[:half], tokenizer, options.length, options.rows)
    batches = [collate(rows[begin : begin + 4]) for begin in range(0, len(rows), 4)]
    batches = [{name: values.to(model.device) for name, values in batch.items()} for batch in batches]
    total, in_layers = count_params(model)
    keep = 1 - options.removed * total / in_layers
    statistics = collect_statistics(
        model, batches, settings=CalibrationSettings(hidden=False, precision=torch.bfloat16)
    )
    dense = perplexity(model, unseen, collate)
    result: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    params = round(keep * in_layers)
    sources: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
        "ours": lambda: ours(model, batches, keep, statistics),
        "plain": lambda: plain(model, batches, keep, statistics),
        "torch-pruning": lambda: torch_pruning(model, batches, keep, params),
        "OptiPFair": lambda: optipfair(model, batches, keep, params),
    }
    for source, students in sources.items():
        try:
            for name, make in students():
                if not name.startswith(options.only):
                    continue
                student = make()
                found = perplexity(student, unseen, collate)
                result[name] = {"perplexity": found, "over_dense": found / dense, "params": count_params(student)[0]}
                print(name, f"{found:.2f} {found / dense:.3f}", file=sys.stderr, flush=True)
                del student
                gc.collect()
        except Exception as error:  # a peer's own failure is a result
            failed[source] = f"{type(error).__name__}: {error}"
    table = Table("", "perplexity", "/ dense", "parameters", title=f"dense {dense:.2f}, {total:,} parameters")
    for name, row in result.items():
        table.add_row(name, f"{row['perplexity']:.2f}", f"{row['over_dense']:.3f}", f"{row['params']:,}")
    Console(width=120).print(table)
    for name, error in failed.items():
        print(f"{name}: {error}")
    options.teacher = None
    data = f"{options.rows} x {options.length} tokens, scored on {options.evaluation_rows} x {2 * options.length}"
    common.print_json("peers_causal", options, data, {"dense": dense, "result": result, "failed": failed})


if __name__ == "__main__":
    main()
