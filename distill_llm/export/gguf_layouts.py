"""How a student is said in GGUF: under which architecture of llama.cpp, and with which sizes of every layer.

llama.cpp reads the sizes of each layer for a few architectures only. An uneven student of the Llama kind is written as `deci`
(interleaved rotary embeddings, no norms of queries and keys), one of the Qwen3 kind as `openelm` (fused projections, norms of
queries and keys, tied output). A student with the same sizes in all layers is written under its own architecture.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.families import dims_of, family_of, layers_of, width_of
from distill_llm.architectures.modeling_pruned import layer_counts
from distill_llm.common.errors import InputError

LEAST_NEURONS = 32
"""Neurons, all zero, that stand for a removed FFN: llama.cpp drops the attention's output of a layer with none."""


@dataclass(frozen=True)
class Layout:
    """An architecture of llama.cpp.

    Attributes:
        name: in the file's metadata.
        interleaved: whether rotary embeddings turn neighbouring channels of a head, not those half a head apart.
        fused: whether queries, keys and values are one tensor.
        heads_fill_width: whether the channels of all query heads must be as many as those of the residual stream.
        without_heads: whether a layer may have no heads.
    """

    name: str
    interleaved: bool = False
    fused: bool = False
    heads_fill_width: bool = False
    without_heads: bool = False


_DECI = Layout("deci", interleaved=True, without_heads=True)
_OPENELM = Layout("openelm", fused=True)
# The family's own architecture, and the one for uneven students.
_LAYOUTS = {
    "llama": (Layout("llama", interleaved=True), _DECI),
    "mistral": (Layout("llama", interleaved=True), _DECI),
    "qwen2": (Layout("qwen2", heads_fill_width=True), _DECI),
    "qwen3": (Layout("qwen3"), _OPENELM),
}


@dataclass(frozen=True)
class LayerSize:
    """What is written of a layer.

    Attributes:
        heads, groups: query heads and key-value heads.
        no_heads, no_neurons: those that are written, if any, are zeros, in place of a removed part.
    """

    heads: int
    groups: int
    neurons: int
    no_heads: bool
    no_neurons: bool


def layout_of(model: PreTrainedModel) -> tuple[Layout, list[LayerSize]]:
    """The architecture that a model is written under, and the sizes of its layers.

    Raises:
        InputError: llama.cpp has no architecture that holds it.
    """
    config = model.config
    check_config(config)
    family, dims = family_of(model), dims_of(config)
    counts = [layer_counts(layer, family, dims) for layer in layers_of(model)]
    kinds = {tuple(each.values()) for each in counts}
    own, uneven = _LAYOUTS[config.model_type]
    even = len(kinds) == 1 and all(counts[0].values())
    if own.heads_fill_width and counts[0]["queries"] * dims.head_size != width_of(model):
        even = False
    layout = own if even else uneven
    if layout is _OPENELM and not config.tie_word_embeddings:
        fix = (
            "prune it with `uniform: true`: of uneven Qwen3 models llama.cpp runs only those whose output head is tied "
            "to the embedding"
        )
        raise InputError("model_dir", "an uneven Qwen3 with an output head of its own", fix=fix)
    return layout, [_size(model, index, each, layout) for index, each in enumerate(counts)]


def _size(model: PreTrainedModel, index: int, counts: dict[str, int], layout: Layout) -> LayerSize:
    layer = layers_of(model)[index]
    no_heads, no_neurons = not counts["heads"], not counts["neurons"]
    queries, groups = counts["queries"], counts["heads"]
    # Without heads nothing can add the output's bias, and llama.cpp reads the first layer's heads as the model's.
    bias = layer.get_submodule(family_of(model).attention_out).bias is not None
    if no_heads and (index == 0 or bias or not layout.without_heads):
        queries = groups = 1
    return LayerSize(queries, groups, counts["neurons"] or LEAST_NEURONS, no_heads, no_neurons)


def check_config(config: PreTrainedConfig) -> None:
    """Check that llama.cpp computes what this family does.

    Raises:
        InputError: it does not.
    """
    kind, heads = config.model_type, config.architectures or ["a base model"]
    if kind not in _LAYOUTS or not heads[0].endswith("ForCausalLM"):
        raise InputError("model_dir", f"{heads[0]} ({kind})", f"a causal LM of {', '.join(_LAYOUTS)}, for GGUF")
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds or (window and kind == "mistral"):
        given = f"{kind} with sliding_window {window}"
        raise InputError("model_dir", given, "a model whose layers attend to all tokens, for GGUF")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        given = f"{kind} with rope_type {rope!r}"
        raise InputError("model_dir", given, "rotary embeddings of type default, linear or llama3, for GGUF")
    if config.hidden_act != "silu":
        given = f"{kind} with hidden_act {config.hidden_act!r}"
        raise InputError("model_dir", given, "a model with hidden_act silu, for GGUF")
