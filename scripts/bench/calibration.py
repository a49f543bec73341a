"""What one pass of `collect_statistics` costs: its time over the time of a plain forward over the same batches.

The sides take turns on the same batches, with SDPA, in evaluation mode, and in fp32 unless stated otherwise:

- forward: the model without labels under `no_grad`. The floor.
- backward: forward, loss and backward with all weights frozen, gradients from the first layer on; nothing is collected.
  What any method with gradients of activations pays at least.
- heads, neurons, layers: `collect_statistics` without the residual stream's channels and without second moments.
- + channels, + moments: the same with one of the two. everything: with both, the default and what the pipeline does.
- moments of all tokens: everything, with `moment_share=1.0`.
- everything, exact: the backward products in fp32 too. everything, bf16: both passes under autocast.
- everything, checkpointed; the rest, checkpointed: one layer's activations at a time, with and without second moments.
- torch-pruning: forward, loss and backward with gradients of all weights summed over the batches (its Taylor importance
  reads them), then `GroupTaylorImportance` of every group of FFN neurons and attention channels. Its dependency graph
  is built beforehand and not counted.
- OptiPFair (decoders with gated FFNs only): its calibration, forward passes with hooks on FFN-down alone.

Two more tables: rank correlation of scores with those of the exact pass, and the most bytes held at once, weights included,
over those of a forward pass that keeps its activations for a backward pass. `--causal` takes a decoder and text in JSON lines
in place of a classifier and SST-2. On a machine that others use too, `--threads 1 --clock cpu` compares processor time.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any

import common
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from transformers import AutoTokenizer, PreTrainedModel

from distill_llm import CalibrationSettings, Statistics, collect_statistics, load_pretrained, score
from distill_llm.architectures.families import family_of, layers_of
from distill_llm.data.causal import document_packer
from distill_llm.measuring.counting import _LiveStorages, weights_memory
from distill_llm.pruning.units.sizes import counts_of

Batches = Sequence[Mapping[str, torch.Tensor]]
FLOOR, EXACT = "forward", "everything, exact"
OURS: dict[str, CalibrationSettings] = {
    "heads, neurons, layers": CalibrationSettings(hidden=False, moments=False),
    "+ channels": CalibrationSettings(moments=False),
    "+ moments": CalibrationSettings(hidden=False),
    "everything": CalibrationSettings(),
    "moments of all tokens": CalibrationSettings(moment_share=1.0),
    EXACT: CalibrationSettings(exact=True),
    "everything, bf16": CalibrationSettings(precision=torch.bfloat16),
    "everything, checkpointed": CalibrationSettings(checkpointing=True),
    "the rest, checkpointed": CalibrationSettings(checkpointing=True, moments=False),
}


def forward(model: PreTrainedModel, batches: Batches) -> None:
    """The floor."""
    with torch.no_grad():
        for batch in batches:
            model(**without_labels(batch))


def without_labels(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a plain forward pass reads."""
    return {name: value for name, value in batch.items() if name != "labels"}


def backward(model: PreTrainedModel, batches: Batches) -> None:
    """Gradients of activations from the first layer on, none of weights."""
    model.requires_grad_(False)

    def open_graph(module: torch.nn.Module, args: tuple) -> tuple:
        return (args[0].detach().requires_grad_(), *args[1:])

    handle = layers_of(model)[0].register_forward_pre_hook(open_graph)
    for batch in batches:
        model(**batch).loss.backward()
    handle.remove()
    model.requires_grad_(True)


def torch_pruning_taylor(model: PreTrainedModel, batches: Batches) -> Callable[[], list[torch.Tensor]]:
    """A function that computes torch-pruning's Taylor importance of FFN neurons and attention channels of every layer.

    Where queries share keys, of FFN neurons alone: looking for the groups of the query's channels does not come to an end.
    """
    import torch_pruning

    example = {name: value[:2] for name, value in without_labels(batches[0]).items()}
    model.config.use_cache = False
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    family = family_of(model)
    paths = [next(iter(family.ffn_in))]
    if all(each["queries"] == each["heads"] for each in counts_of(model)):
        paths.append(next(iter(family.attention_in)))
    roots = [layer.get_submodule(path) for layer in layers_of(model) for path in paths]
    cut = torch_pruning.prune_linear_out_channels
    groups = [graph.get_pruning_group(root, cut, idxs=list(range(root.out_features))) for root in roots]
    importance = torch_pruning.importance.GroupTaylorImportance()

    def work() -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            model(**batch).loss.backward()
        scores = [importance(group) for group in groups]
        model.zero_grad()
        return scores

    return work


def optipfair_norms(model: PreTrainedModel, batches: Batches) -> Callable[[], dict[int, torch.Tensor]]:
    """A function that runs OptiPFair's calibration."""
    from optipfair.pruning import mlp_glu

    if not hasattr(layers_of(model)[0], "mlp"):
        raise ValueError("no gated FFN: it prunes GLU models only")

    def work() -> dict[int, torch.Tensor]:
        handles = mlp_glu.setup_mlp_hooks_for_importance(model, model.device)
        mlp_glu.run_calibration_forward_passes(model, batches, model.device, show_progress=False)
        for handle in handles:
            handle.remove()
        return mlp_glu.get_activation_norms()

    return work


PEERS = {"torch-pruning": ("torch_pruning", torch_pruning_taylor), "OptiPFair": ("optipfair", optipfair_norms)}


def causal_setting(options: argparse.Namespace) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]], str]:
    """A decoder and whole rows of its text."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    with open(options.data) as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 8 * options.examples)]
    packed = document_packer("text", tokenizer, options.length)({"text": texts})
    rows = torch.tensor(packed["input_ids"][: options.examples])
    model = load_pretrained(options.teacher).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    pieces = [piece.to(model.device) for piece in rows.split(options.batch_size)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in pieces]
    return model, batches, f"{len(rows)} rows of {options.length} tokens of text"


def seconds(work: Callable[[], Any], clock: str) -> float:
    """Of wall time, or of the process's own processor time."""
    if clock == "wall":
        return common.seconds(work)
    gc.collect()
    begin = time.process_time()
    work()
    return time.process_time() - begin


def rank_correlations(found: Mapping[str, Statistics]) -> dict[str, dict[str, list[float]]]:
    """Of every pass with the exact one: kind of unit -> criterion -> median and smallest over layers."""
    result: dict[str, dict[str, list[float]]] = {}
    for name, statistics in found.items():
        for criterion in ("fisher", "taylor", "wanda", "activation") if name != EXACT else ():
            ours, exact = score(statistics, criterion), score(found[EXACT], criterion)
            grouped = len(ours.queries[0]) != len(ours.heads[0])
            pairs: dict[str, list[tuple[Any, Any]]] = {
                kind: list(zip(getattr(ours, kind), getattr(exact, kind), strict=True))
                for kind in (("heads", "neurons", "queries") if grouped else ("heads", "neurons"))
            }
            pairs["channels"] = [(ours.hidden, exact.hidden)]
            for kind, both in pairs.items():
                values = torch.tensor([spearmanr(*pair).statistic for pair in both if len(pair[0]) > 2])
                if len(values):
                    cells = [round(float(values.median()), 5), round(float(values.min()), 5)]
                    result.setdefault(f"{name}: {kind}", {})[criterion] = cells
    return result


class _Held(_LiveStorages):
    """Without tensors on the meta device, of which the pass makes some and which hold nothing."""

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._follow(storage)


def peak(model: PreTrainedModel, batches: Batches, work: Callable[[], Any]) -> int:
    """Most bytes held at once, weights included."""
    known = [*model.parameters(), *model.buffers(), *(value for batch in batches for value in batch.values())]
    model.zero_grad()
    gc.collect()
    with _Held(known) as live:
        work()
    return weights_memory(model) + live.peak


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--causal", action="store_true", help="--teacher is a decoder, --data a file of JSON lines")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row of text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.causal:
        model, batches, text = causal_setting(options)
    else:
        setting = common.setting(options, options.examples)
        model, batches, text = setting.teacher, setting.batches(setting.rows, options.batch_size), setting.text
    found: dict[str, Statistics] = {}

    def collecting(name: str) -> Callable[[], None]:
        def work() -> None:
            found[name] = collect_statistics(model, batches, settings=OURS[name])

        return work

    work: dict[str, Callable[[], Any]] = {FLOOR: lambda: forward(model, batches)}
    work["backward"] = lambda: backward(model, batches)
    work |= {name: collecting(name) for name in OURS}
    for name, (package, peer) in PEERS.items():
        try:
            if find_spec(package) is None:
                raise ImportError("not installed (pip install --no-deps -r scripts/bench/peers.txt)")
            work[name] = peer(model, batches)
        except Exception as error:  # a peer's own failure is a result
            print(f"{name} is left out: {type(error).__name__}: {error}")
    sides = {name: (lambda run=run: seconds(run, options.clock)) for name, run in work.items()}
    common.alternate(sides, 1)  # warm-up, not counted
    times = common.alternate(sides, options.rounds)
    common.print_table(f"One calibration pass: {text}, batch {options.batch_size}", times, FLOOR)
    bf16 = {f"bf16 / {name}": common.ratio(times["everything, bf16"], times[name]) for name in ("everything", EXACT)}
    print(*(f"{name}: {value}" for name, value in bf16.items()), sep="\n")

    ranks = rank_correlations({name: found[name] for name in ("everything", EXACT, "everything, bf16")})
    table = Table(
        "rank correlation with exact, median (smallest) over layers", "fisher", "taylor", "wanda", "activation"
    )
    for name, row in ranks.items():
        table.add_row(name, *(f"{median:.4f} ({low:.4f})" for median, low in row.values()))
    Console(width=140).print(table)

    kept = peak(model, batches, lambda: model(**batches[-1]).loss)
    memory = {name: peak(model, batches, run) / kept for name, run in work.items()}
    table = Table("peak memory over a forward pass with activations", f"1 is {kept / 1e6:.0f} MB")
    for name, value in memory.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    results = {"over_forward": common.ratios(times, FLOOR), "bf16_over": {k: v.__dict__ for k, v in bf16.items()}}
    common.print_json("calibration", options, text, {**results, "ranks": ranks, "memory": memory, "kept_bytes": kept})


if __name__ == "__main__":
    main()
