"""Pruning alone, no training, beside plain criteria and other toolkits: every student has as many layer parameters as ours,
as nearly as possible.

Heads and FFN neurons go, the residual stream stays. All see the same calibration rows, and all are scored in memory:

- ours: Fisher over heads and neurons together (the default), or Taylor with the same share of each, compensated; also in small
  cuts, with statistics of the same rows anew after each (the recipe's `cuts`).
- plain: each of our criteria without compensation, over all layers.
- torch-pruning: its Taylor, L2 and Hessian importance, ranked within each layer, or over all layers (`global_pruning`; with
  `isomorphic` the matched students are the same). Whole heads go (`prune_num_heads`), the share asked for; the FFN's ratio is
  corrected until the count is ours.
- TextPruner: its iterative pruner with the task's loss, equal sizes in all layers or not, in one or more iterations. It zeroes
  what it chose (`keep_shape`, which scores as removal does): removal itself calls `prune_heads`, which transformers 5 lacks.

A side that fails is left out, and its first error is printed.

    python scripts/bench/peers_pruning.py --teacher runs/bench/sst2-0-half/teacher --task sst2 --data GLUE/SST-2
"""

import copy
import gc
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pruning import Subject, arguments, print_record, subject
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from distill_llm import CalibrationSettings, Importance, Statistics, collect_statistics, plan_pruning, prune, score
from distill_llm.architectures.families import layers_of
from distill_llm.measuring.counting import count_params
from distill_llm.pruning.units.costs import unit_costs

Gradients = dict[str, torch.Tensor]
Student = tuple[Any, int]
"""A model that can be scored, and the parameters in its layers."""
Method = Callable[[Subject, float, int], Student]
"""Of a teacher, a share to keep and a number of layer parameters: the student."""

PLAIN = ("fisher", "taylor", "wanda", "activation", "magnitude", "magnitude_l1", "random")
RANKINGS = {"local": False, "global": True}


def torch_pruning_students(given: Subject) -> Iterator[tuple[str, Method]]:
    """A method for each importance and ranking of torch-pruning; gradients are summed over the calibration rows once."""
    from torch_pruning.pruner import importance

    summed, squared = summed_gradients(given), hessian_gradients(given)
    kinds: list[tuple[str, Any, Gradients]] = [
        ("Taylor", importance.GroupTaylorImportance, summed),
        ("L2", importance.GroupMagnitudeImportance, {}),
        ("Hessian", importance.GroupHessianImportance, squared),
    ]
    for name, kind, gradients in kinds:
        for ranking, over_layers in RANKINGS.items():
            yield f"torch-pruning {name}, {ranking}", torch_pruning_method(kind, gradients, over_layers)


def summed_gradients(given: Subject) -> Gradients:
    """Gradients of the loss, summed over batches, as in torch-pruning's examples."""
    model = copy.deepcopy(given.model)
    for batch in given.batches:
        model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def hessian_gradients(given: Subject, examples: int = 64) -> Gradients:
    """What `accumulate_grad` leaves after one backward pass for each example.

    In 1.6.1 it looks for names in a dictionary of parameters, finds none, and keeps the last example alone: more examples
    change nothing.
    """
    from torch_pruning.pruner.importance import GroupHessianImportance

    model, scorer = copy.deepcopy(given.model), GroupHessianImportance()
    rows = [{name: value[[i]] for name, value in batch.items()} for batch in given.batches[::8] for i in range(32)]
    for row in rows[:examples]:
        model.zero_grad()
        model(**row).loss.backward()
        scorer.accumulate_grad(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: total / scorer._counter[p] for p, total in scorer._accu_grad.items()}


def torch_pruning_method(kind: Any, gradients: Gradients, over_layers: bool) -> Method:
    """Prune a copy at the head ratio asked for and the FFN ratio that gives the parameters."""

    def method(given: Subject, keep: float, params: int) -> Student:
        costs, config = unit_costs(given.model), given.model.config
        whole = costs.at("neurons") * config.intermediate_size * config.num_hidden_layers
        best, ratio = None, 1 - keep
        for _ in range(8):
            student = torch_pruned(given, kind(), gradients, over_layers, 1 - keep, ratio)
            count = count_params(student)[1]
            if best is None or abs(count - params) < abs(best[1] - params):
                best = student, count
            if abs(count - params) < 5e-4 * params:
                break
            ratio = min(max(ratio + (count - params) / whole, 0.0), 1.0)
            del student
            gc.collect()  # its dependency graph is a cycle that holds the model
        assert best is not None
        return best

    return method


def torch_pruned(
    given: Subject, importance: Any, gradients: Gradients, over_layers: bool, head_ratio: float, ffn_ratio: float
) -> PreTrainedModel:
    """A copy pruned by torch-pruning's pruner."""
    from torch_pruning.pruner import BasePruner

    model = copy.deepcopy(given.model)
    for name, gradient in gradients.items():
        model.get_parameter(name).grad = gradient.clone()
    inner = [root for layer in layers_of(model) for root in (*_projections(layer), layer.intermediate.dense)]
    kept_whole = [m for m in model.modules() if not list(m.children()) and not any(m is each for each in inner)]
    heads = {root: model.config.num_attention_heads for layer in layers_of(model) for root in _projections(layer)}
    example = {name: value[:2] for name, value in given.batches[0].items() if name != "labels"}
    pruner = BasePruner(
        model,
        example,
        importance,
        global_pruning=over_layers,
        pruning_ratio=ffn_ratio,
        head_pruning_ratio=head_ratio,
        ignored_layers=kept_whole,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    model.zero_grad()
    return model


def _projections(layer: Any) -> tuple[torch.nn.Linear, ...]:
    return layer.attention.self.query, layer.attention.self.key, layer.attention.self.value


def _counts(heads: float, neurons: float) -> dict[str, float]:
    """Units of a BERT layer."""
    return {"heads": heads, "queries": heads, "neurons": neurons}


def textpruner_students(given: Subject, iterations: int, folder: str) -> Iterator[tuple[str, Method]]:
    """TextPruner with equal sizes in all layers (its default), without, and in several iterations."""
    import textpruner

    def method(even: bool, iterations: int) -> Method:
        def run(given: Subject, keep: float, params: int) -> Student:
            model, costs = copy.deepcopy(given.model), unit_costs(given.model)
            count, of = model.config.num_hidden_layers, model.config.num_attention_heads
            heads = round(keep * of)
            rest = params - costs.of([_counts(heads, 0)] * count)
            config = textpruner.TransformerPruningConfig(
                target_ffn_size=int(rest / costs.at("neurons") / count),
                target_num_of_heads=heads,
                pruning_method="iterative",
                ffn_even_masking=even,
                head_even_masking=even,
                n_iters=iterations,
            )
            general = textpruner.GeneralConfig(use_device="cpu", output_dir=f"{folder}/{even}")
            pruner = textpruner.TransformerPruner(model, config, general)
            # The first iteration's scores are the same for every budget: it keeps them in its folder.
            pruner.prune(given.batches, keep_shape=True, save_model=False, rewrite_cache=False)
            sizes = zip(pruner.head_mask.sum(1).tolist(), pruner.ffn_mask.sum(1).tolist(), strict=True)
            return model, round(costs.of([_counts(*each) for each in sizes]))

        return run

    yield "TextPruner, equal layers", method(True, 1)
    yield "TextPruner, unequal layers", method(False, 1)
    if iterations > 1:
        yield f"TextPruner, unequal layers, {iterations} iterations", method(False, iterations)


def in_cuts(given: Subject, keep: float, cuts: int, criterion: str) -> PreTrainedModel:
    """Ours, with statistics anew after each of `cuts` equal parts of what is removed."""
    student, left = given.model, 1.0
    for number in range(1, cuts + 1):
        share = 1 - (1 - keep) * number / cuts
        statistics = collect_statistics(student, given.batches, settings=CalibrationSettings(hidden=False))
        plan = plan_pruning(student, score(statistics, criterion), share / left)
        student, left = prune(student, plan, statistics), share
    return student


def plain_students(given: Subject, statistics: Statistics) -> Iterator[tuple[str, Method]]:
    """Our criteria without compensation."""
    for criterion in PLAIN:
        importance = score(statistics, criterion)

        def method(given: Subject, keep: float, params: int, importance: Importance = importance) -> Student:
            student = prune(given.model, plan_pruning(given.model, importance, keep))
            return student, count_params(student)[1]

        yield f"plain {criterion}", method


def scored(given: Subject, students: Iterable[PreTrainedModel]) -> list[dict[str, float]]:
    """A row of the table for each student."""
    return [{"score": given.dev(student), "layer_params": count_params(student)[1]} for student in students]


def main() -> None:
    """Print the table and one JSON line."""
    parser = arguments(__doc__)
    parser.add_argument("--ours-alone", action="store_true", help="leave out plain criteria and other toolkits")
    parser.add_argument("--iterations", type=int, default=4, help="of TextPruner's third row, and our cuts; 1: neither")
    args = parser.parse_args()
    given = subject(args)
    statistics = collect_statistics(given.model, given.batches, settings=CalibrationSettings(hidden=False))
    dense = given.dev(given.model)
    result: dict[str, list[dict[str, float]]] = {}
    for criterion in ("fisher", "taylor"):
        importance = score(statistics, criterion)
        at_once = (prune(given.model, plan_pruning(given.model, importance, keep), statistics) for keep in args.keep)
        result[f"ours: {criterion}, compensated"] = scored(given, at_once)
        if args.iterations > 1:
            in_parts = (in_cuts(given, keep, args.iterations, criterion) for keep in args.keep)
            result[f"ours: {criterion}, compensated, {args.iterations} cuts"] = scored(given, in_parts)
    counts = [int(row["layer_params"]) for row in result["ours: fisher, compensated"]]
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Iterator[tuple[str, Method]]] = {
            "plain": plain_students(given, statistics),
            "torch-pruning": torch_pruning_students(given),
            "TextPruner": textpruner_students(given, args.iterations, folder),
        }
        for source, students in () if args.ours_alone else sources.items():
            try:
                for name, method in students:
                    found = (method(given, keep, count) for keep, count in zip(args.keep, counts, strict=True))
                    result[name] = [{"score": given.dev(student), "layer_params": count} for student, count in found]
                    print(name, *(f"{row['score']:.4f}" for row in result[name]), file=sys.stderr, flush=True)
            except Exception as error:  # a peer's own failure is a result
                failed[source] = f"{type(error).__name__}: {error}"
    title = f"{args.task} ({args.split}), dense {dense:.4f}; score (layer parameters)"
    table = Table("", *(f"{keep:.0%} kept" for keep in args.keep), title=title)
    for name, rows in result.items():
        table.add_row(name, *(f"{row['score']:.4f} ({row['layer_params']:,})" for row in rows))
    Console(width=140).print(table)
    for name, error in failed.items():
        print(f"{name}: {error}")
    print_record("peers_pruning", args, dense=dense, result=result, failed=failed)


if __name__ == "__main__":
    main()
