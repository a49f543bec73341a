"""Classifiers with exits: heads after some of the layers, by which rows of a batch can leave before the last layer.

Needs only torch, transformers and the files in EXIT_CODE_NAMES. `save_pretrained` of a model with exits puts copies of them into
the checkpoint, so `AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` has the exits where
distill_llm is not installed. The exits of a model that is not pruned are left out where the code is not allowed to run: it is the
plain model then, which gives what this one gives without a threshold.

Public names: `ExitModel`, `exit_class`, `has_exits`, `exit_fault`, and a class for every family, made on first use:
`ExitBertForSequenceClassification`, `ExitPrunedBertForSequenceClassification`, ...
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_pruned import STOCK_PREFIX
from .families import layers_of, width_of
from .leaving import AllHaveLeft, Leaving
from .modeling_pruned import CODE_NAMES, copy_code, pruned_class

EXIT_PREFIX = "Exit"
EXIT_CODE_NAMES = (*CODE_NAMES, "leaving.py", "modeling_exits.py")
EXIT_FAMILIES = ("bert", "ernie", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Families whose layers read (B, T, H) states and a mask, and whose heads read the first token."""
_AUTO = "AutoModelForSequenceClassification"
_END = _AUTO.removeprefix("AutoModel")
_DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")


def exit_fault(config: PreTrainedConfig, model_class: str, after: Sequence[int]) -> tuple[str, Any, str] | None:
    """What is wrong with exits `after` so many layers of a model: what of it, what was given, what is accepted; None: nothing."""
    labels = config.num_labels or 0
    problem = getattr(config, "problem_type", None)
    if config.model_type not in EXIT_FAMILIES or not model_class.endswith(_END):
        return "", model_class, f"a ...{_END} model of {', '.join(EXIT_FAMILIES)}"
    if labels < 2 or problem not in (None, "single_label_classification") or getattr(config, "is_decoder", False):
        return (
            "",
            f"{problem or 'a head'} with {labels} output(s)",
            "an encoder that gives each example one of its classes",
        )
    layers = config.num_hidden_layers
    if not after or list(after) != sorted(set(after)) or not all(0 < count < layers for count in after):
        return "after", list(after), f"numbers of layers from 1 to {layers - 1}, in rising order"
    return None


@dataclass
class ExitOutput(SequenceClassifierOutput):
    """What a model with exits gives.

    Attributes:
        logits: (B, C) of the last head, or of the exit at which a row left.
        exit_logits: (B, E, C) of all exits, in training and where they are asked for.
        exit_states: (B, E + 1, H) what each exit makes of its layer's first state, and that state after the last layer.
        layers_run: (B,) the number of layers that each row went through, where rows could leave.
    """

    exit_logits: torch.Tensor | None = None
    exit_states: torch.Tensor | None = None
    layers_run: torch.Tensor | None = None


class ExitHead(nn.Module):
    """A classifier of the first token: a map of its state, and a linear map of the tanh of that to the classes.

    Args:
        config: of the model.
        width: H, channels of its states.
    """

    def __init__(self, config: PreTrainedConfig, width: int):
        super().__init__()
        rates = (getattr(config, name, None) for name in _DROPOUTS)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.0))
        self.out = nn.Linear(width, config.num_labels or 2)

    def forward(self, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H) the map of the first tokens' states (B, H), and (B, C) logits."""
        state = self.dense(first)
        return state, self.out(self.dropout(torch.tanh(state)))


class ExitModel:
    """Mixed into a class of a classifier by `exit_class`. What the last head gives is what the model without exits gives.

    `config.exits` says after how many layers there are exits (`after`), and a `threshold` that was chosen for them, if one was.

    Attributes:
        exit_threshold: in eval mode, rows leave at the first exit whose largest probability is above it; None, as it is after
            loading: all rows go through all layers. An argument of the forward of the same name goes before it.
    """

    config: PreTrainedConfig
    training: bool

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = getattr(config, "exits", None) or {}
        fault = exit_fault(config, type(self).__name__, said.get("after") or [])
        if fault is not None:
            raise ValueError("exits{}{}: got {}; accepted: {}".format("." if fault[0] else "", *fault))
        width = width_of(config)
        self.exit_heads = nn.ModuleList(ExitHead(config, width) for _ in said["after"])
        for module in self.exit_heads.modules():
            self._init_weights(module)  # type: ignore[attr-defined]
        self.exit_threshold: float | None = None

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as of pruned models."""
        return False

    @property
    def _exits(self) -> list[tuple[int, nn.Module]]:
        return list(zip(self.config.exits["after"], self.exit_heads, strict=True))  # type: ignore[attr-defined]

    def _forward(self, inputs: dict[str, Any], threshold: float | None, every: bool) -> Any:
        """The forward: in training or with `every`, with the outputs of all exits; with a threshold, rows leave."""
        if threshold is None and not self.training and not every:
            threshold = self.exit_threshold
        if threshold is None and not self.training and not every:
            return super().forward(**inputs)  # type: ignore[misc]
        named = inputs.pop("return_dict", None)
        outputs = self._with_all(inputs) if threshold is None else self._leaving(inputs, threshold, every)
        named = getattr(self.config, "return_dict", True) if named is None else named
        return outputs if named else outputs.to_tuple()

    def _with_all(self, inputs: dict[str, Any]) -> ExitOutput:
        layers, firsts = layers_of(self), {}  # type: ignore[arg-type]

        def keep(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                firsts[place] = (output[0] if isinstance(output, tuple) else output)[:, 0]

            return hook

        places = [*(count for count, _ in self._exits), len(layers)]
        with _removed(layers[count - 1].register_forward_hook(keep(count)) for count in places):
            outputs = super().forward(**inputs, return_dict=True)  # type: ignore[misc]
        found = [head(firsts[count]) for count, head in self._exits]
        return ExitOutput(
            **outputs,
            exit_logits=torch.stack([logits for _, logits in found], 1),
            exit_states=torch.stack([*(state for state, _ in found), firsts[len(layers)]], 1),
        )

    def _leaving(self, inputs: dict[str, Any], threshold: float, every: bool) -> ExitOutput:
        wanted = [name for name in ("output_hidden_states", "output_attentions") if inputs.get(name)]
        wanted += ["output_exits"] if every else []
        wanted += ["flex_attention"] if getattr(self.config, "_attn_implementation", None) == "flex_attention" else []
        if self.training or wanted:
            given = "training mode" if self.training else wanted[0]
            raise ValueError(
                f"exit_threshold: got {threshold} with {given}; leave it out, or put the model in eval mode"
            )
        labels, leaving, layers = inputs.pop("labels", None), Leaving(threshold), layers_of(self)  # type: ignore[arg-type]
        hooks = [layers[0].register_forward_pre_hook(leaving.begin, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(leaving.before, with_kwargs=True) for layer in layers[1:]]
        hooks += [layers[count - 1].register_forward_hook(leaving.at(head, count)) for count, head in self._exits]
        with _removed(hooks):
            try:
                outputs = super().forward(**inputs, return_dict=True)  # type: ignore[misc]
                leaving.left.append((leaving.rows, outputs.logits, len(layers)))
            except AllHaveLeft:
                pass
        logits, counts = leaving.result()
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.view(-1))
        return ExitOutput(loss=loss, logits=logits, layers_run=counts)

    def _auto_map(self) -> dict[str, str]:
        """Where the code beside the weights has the classes."""
        pruned: Mapping[str, str] = getattr(super(), "_auto_map", dict)()
        return {**pruned, _AUTO: f"modeling_exits.{type(self).__name__}"}

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the code."""
        self.config.auto_map = self._auto_map()
        if is_main_process:
            copy_code(save_directory, EXIT_CODE_NAMES)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: stamp for name, stamp in stamps.items() if name not in EXIT_CODE_NAMES}


@contextmanager
def _removed(hooks: Any) -> Iterator[None]:
    """The hooks go when the context ends."""
    there = list(hooks)
    try:
        yield
    finally:
        for hook in there:
            hook.remove()


def has_exits(model: Any) -> bool:
    """Whether a model has exits; also one whose class is from a checkpoint's copy of this file."""
    return any(each.__name__ == "ExitModel" for each in type(model).__mro__)


def _forward_like(base: type[PreTrainedModel]) -> Callable[..., Any]:
    """A forward with the arguments of a class, by name, and two more."""
    given = inspect.signature(base.forward)
    names = [name for name in given.parameters if name != "self"]

    def forward(
        self: Any, *args: Any, exit_threshold: float | None = None, output_exits: bool = False, **kwargs: Any
    ) -> Any:
        """As the forward without exits. Rows leave at `exit_threshold`; with `output_exits`, what all exits give is given too."""
        return self._forward({**dict(zip(names, args, strict=False)), **kwargs}, exit_threshold, output_exits)

    last = [each for each in given.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter("exit_threshold", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("output_exits", inspect.Parameter.KEYWORD_ONLY, default=False),
    ]
    first = [each for each in given.parameters.values() if each not in last]
    forward.__signature__ = given.replace(parameters=[*first, *more, *last])  # type: ignore[attr-defined]
    return forward


_classes: dict[str, type[PreTrainedModel]] = {}


def exit_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class for classifiers of a class, pruned or not, with exits."""
    if issubclass(base, ExitModel):
        return base
    name = EXIT_PREFIX + base.__name__
    if name not in _classes:
        own: dict[str, Any] = {"__module__": __name__, "__doc__": ExitModel.__doc__, "config_class": base.config_class}
        _classes[name] = type(name, (ExitModel, base), {**own, "forward": _forward_like(base)})
    return _classes[name]


def __getattr__(name: str) -> type[PreTrainedModel]:
    plain = name.removeprefix(EXIT_PREFIX)
    stock = getattr(transformers, plain.removeprefix(STOCK_PREFIX), None) if name.startswith(EXIT_PREFIX) else None
    if stock is None or not name.endswith(_END):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return exit_class(pruned_class(stock) if plain.startswith(STOCK_PREFIX) else stock)
