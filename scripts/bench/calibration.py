"""What one pass of `collect_statistics` costs: its time over the time of a plain forward over the same batches.

Sides, taking turns on the same batches, fp32, SDPA, evaluation mode:

- forward: the model without labels under `no_grad`. The floor.
- backward: forward, loss and backward with all weights frozen, gradients from the first layer on; nothing is collected.
  What any method with gradients of activations pays at least.
- statistics: `collect_statistics`, everything in one pass, without second moments.
- statistics + moments: the same with the second moments that compensation needs; what the pipeline does.
- torch-pruning: forward, loss and backward with gradients of all weights summed over the batches (its Taylor importance
  reads them), then `GroupTaylorImportance` of every group of FFN neurons and attention channels. Its dependency graph
  is built beforehand and not counted.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import common
import torch
from transformers import PreTrainedModel

from distill_llm import collect_statistics
from distill_llm.pruning.families import layers_of

Batches = Sequence[Mapping[str, torch.Tensor]]
FLOOR = "forward"


def forward(model: PreTrainedModel, batches: Batches) -> None:
    """The floor."""
    with torch.no_grad():
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name != "labels"})


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
    """A function that computes torch-pruning's Taylor importance of heads' channels and FFN neurons of every layer."""
    import torch_pruning

    example = {name: value[:2] for name, value in batches[0].items() if name != "labels"}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    roots = [root for layer in layers_of(model) for root in (layer.attention.self.query, layer.intermediate.dense)]
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


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--examples", type=int, default=512)
    options = parser.parse_args()
    setting = common.setting(options, options.examples)
    model, batches = setting.teacher, setting.batches(setting.rows, options.batch_size)
    work: dict[str, Callable[[], object]] = {
        FLOOR: lambda: forward(model, batches),
        "backward": lambda: backward(model, batches),
        "statistics": lambda: collect_statistics(model, batches, moments=False),
        "statistics + moments": lambda: collect_statistics(model, batches),
    }
    if importlib.util.find_spec("torch_pruning"):
        work["torch-pruning"] = torch_pruning_taylor(model, batches)
    else:
        print("torch-pruning is not installed (pip install --no-deps -r scripts/bench/peers.txt): left out")
    sides = {name: (lambda run=run: common.seconds(run)) for name, run in work.items()}
    common.alternate(sides, 1)  # warm-up, not counted
    times = common.alternate(sides, options.rounds)
    common.print_table(f"One calibration pass: {setting.text}, batch {options.batch_size}", times, FLOOR)
    common.print_json("calibration", options, setting.text, {"over_forward": common.ratios(times, FLOOR)})


if __name__ == "__main__":
    main()
