"""What a row of the table of families says (see `families.py`).

Checkpoints of pruned models hold a copy of this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

READER_NAMES = ("attention", "ffn")
"""What each of `Family.readers` is called where files name them."""


@dataclass(frozen=True)
class Facts:
    """What is known of a family whether it can be pruned or not.

    Attributes:
        packs: whether the sequences of a packed row are kept apart by their `position_ids`; other families mix them silently.
        skipped_positions: how many positions no token takes; "padding": as many as the padding's id, and one.
        logit_powers: config fields whose power multiplies the logits, where it is not the one that other families mean.
    """

    packs: bool = False
    skipped_positions: int | str = 0
    logit_powers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Family(Facts):
    """Where a family keeps the parts that pruning touches. Paths are relative: `layers` to the base model, the rest to a layer.

    `attention` is the module that computes attention; what `attention_in` names feeds it, its outputs enter `attention_out`.
    `ffn_in` feeds `ffn_out`. The values of `attention_in` and `ffn_in` say how a module's outputs are laid out:

    - "q", "kv", "n": the channels of all query heads, of all key-value heads, the neurons;
    - "q kv kv": one after the other;
    - "(q kv kv)": group by group, each its queries, then its key, then its value;
    - "q/", "kv/": a row per head, not per channel; "q[]", "kv[]": a list of modules, one per head.

    `reads` names further linears that read a layer's units, with the layout of their inputs.
    `groups` is the number of key-value heads, or the config's name for it; without one there are as many as queries.
    `ffn_config` is the config's name for the FFN width, `hidden_fields` its names for the width of the residual stream,
    `attention_widths` the attention module's own names for its width. `per_head_inputs` names what the model hands to every
    attention for all the original's heads (position biases). `reads_config`: attention takes its head count from the config.
    `adds_residual`: attention adds its second argument to its output. `parallel`: attention and FFN of a layer read the same, and
    are added up. `normed_after`: a norm comes after attention or FFN, or its output is what they are added to, so that a layer
    does not simply add their outputs to what it reads.
    `anchored`: something follows the first layer alone (DeBERTa-v2's convolution), so that this layer stays, and
    the width. `keeps_width`: the model computes with the config's width while it runs, so that this stays the original's.
    `caches_queries`: keys and values are cached for every query head (Falcon's new architecture repeats those of a
    group before). `mlm_head` is the first module of the masked-LM head.
    `stock` names the units that the family's own config can say fewer of, where every layer has the same number; `dividing`: if
    the query heads that stay divide the width.
    `forms` are (config field, changes of the row where it is set), one after the other.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    attention_in: Mapping[str, str] = field(default_factory=dict)
    attention_out: str = "self_attn.o_proj"
    ffn_in: Mapping[str, str] = field(default_factory=dict)
    ffn_out: str = "mlp.down_proj"
    reads: Mapping[str, str] = field(default_factory=dict)
    ffn_config: str = "intermediate_size"
    hidden_fields: tuple[str, ...] = ("hidden_size",)
    attention_widths: tuple[str, ...] = ()
    per_head_inputs: tuple[str, ...] = ()
    reads_config: bool = False
    adds_residual: bool = False
    parallel: bool = False
    normed_after: bool = False
    anchored: bool = False
    caches_queries: bool = False
    keeps_width: bool = False
    mlm_head: str = "cls"
    groups: int | str = "num_key_value_heads"
    stock: tuple[str, ...] = ("neurons", "layers")
    dividing: bool = False
    forms: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def readers(self) -> tuple[tuple[str, str], ...]:
        """(path, layout of its inputs) of the linears of a layer that read its units.

        Statistics are collected at their inputs, pruning cuts and masks there, and compensation changes their weights.
        """
        return (self.attention_out, "q"), (self.ffn_out, "n"), *self.reads.items()
