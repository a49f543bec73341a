"""The model families that can be pruned, a row for each.

Needs torch and transformers only: checkpoints of pruned models hold a copy of this file beside `modeling_pruned.py`.
"""

from dataclasses import replace
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .family import Facts, Family
from .lineage import lineage_of, stock_values
from .prototypes import BERT, BLOOM, GEMMA, LLAMA, NEOX, PARALLEL, ROBERTA, projections

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "ernie": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "electra": replace(BERT, hidden_fields=("hidden_size", "embedding_size"), mlm_head="generator_predictions"),
    "distilbert": Family(
        layers="transformer.layer",
        attention="attention",
        attention_in=projections("q_lin k_lin v_lin", "attention."),
        attention_out="attention.out_lin",
        ffn_in={"ffn.lin1": "n"},
        ffn_out="ffn.lin2",
        ffn_config="hidden_dim",
        attention_widths=("dim",),
        normed_after=True,
        mlm_head="vocab_transform",
    ),
    # The model makes one position bias for all heads and passes it to every layer.
    "mpnet": replace(
        BERT,
        attention="attention.attn",
        attention_in=projections("q k v", "attention.attn."),
        attention_out="attention.attn.o",
        per_head_inputs=("position_bias",),
        mlm_head="lm_head",
        skipped_positions=2,
    ),
    # Relative positions have projections of their own, unless the config sets share_att_key.
    "deberta-v2": replace(
        BERT,
        attention_in=projections(
            "query_proj key_proj value_proj", "attention.self.", pos_key_proj="q", pos_query_proj="q"
        ),
        hidden_fields=("hidden_size", "pooler_hidden_size", "embedding_size"),
        mlm_head="lm_predictions",
        forms=(("legacy", {"mlm_head": "cls"}), ("conv_kernel_size", {"anchored": True})),
    ),
    # Images: a token for each patch, and one in front. A student reads images of the size that the config says.
    "vit": Family(
        attention="attention",
        attention_in=projections("q_proj k_proj v_proj", "attention."),
        attention_out="attention.o_proj",
        ffn_in={"mlp.fc1": "n"},
        ffn_out="mlp.fc2",
        hidden_fields=("hidden_size", "pooler_output_size"),
        stock=("heads", "neurons", "layers"),
    ),
    "modernbert": Family(
        attention="attn",
        attention_in={"attn.Wqkv": "q kv kv"},
        attention_out="attn.Wo",
        ffn_in={"mlp.Wi": "n n"},
        ffn_out="mlp.Wo",
        mlm_head="head",
    ),
    "llama": replace(LLAMA, dividing=True),
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    # Norms of queries and keys: one over all heads (OLMo 2), a row per head (Cohere), a module per head (StableLM). Norms that
    # all heads share (Qwen3, Gemma 3) need no layout.
    "olmo2": replace(
        LLAMA, attention_in=projections("q_proj k_proj v_proj", q_norm="q", k_norm="kv"), normed_after=True
    ),
    "cohere": replace(
        LLAMA, attention_in=projections("q_proj k_proj v_proj", q_norm="q/", k_norm="kv/"), parallel=True
    ),
    "stablelm": replace(
        LLAMA,
        attention_in=projections("q_proj k_proj v_proj", q_layernorm__norms="q[]", k_layernorm__norms="kv[]"),
        stock=("neurons", "layers"),
        forms=PARALLEL,
    ),
    "starcoder2": replace(LLAMA, ffn_in={"mlp.c_fc": "n"}, ffn_out="mlp.c_proj"),
    "phi": replace(LLAMA, attention_out="self_attn.dense", ffn_in={"mlp.fc1": "n"}, ffn_out="mlp.fc2", parallel=True),
    "phi3": replace(
        LLAMA,
        attention_in={"self_attn.qkv_proj": "q kv kv"},
        ffn_in={"mlp.gate_up_proj": "n n"},
        reads_config=True,
    ),
    "opt": replace(
        LLAMA,
        layers="decoder.layers",
        attention_out="self_attn.out_proj",
        ffn_in={"fc1": "n"},
        ffn_out="fc2",
        ffn_config="ffn_dim",
        hidden_fields=("hidden_size", "word_embed_proj_dim"),
        attention_widths=("embed_dim",),
        normed_after=True,
        stock=("neurons", "layers"),
        packs=False,
        forms=(("do_layer_norm_before", {"normed_after": False}),),
    ),
    "gpt2": Family(
        layers="h",
        attention="attn",
        attention_in={"attn.c_attn": "q kv kv"},
        attention_out="attn.c_proj",
        ffn_in={"mlp.c_fc": "n"},
        ffn_out="mlp.c_proj",
        ffn_config="n_inner",
        attention_widths=("embed_dim",),
        packs=True,
    ),
    "gpt_neox": replace(NEOX, forms=PARALLEL, packs=True),
    # The FFN of BLOOM is always four times as wide as the residual stream.
    "bloom": replace(
        BLOOM,
        ffn_config="",
        per_head_inputs=("alibi",),
        adds_residual=True,
        stock=("layers",),
        forms=(("apply_residual_connection_post_layernorm", {"normed_after": True}),),
    ),
    "falcon": replace(
        BLOOM,
        ffn_config="ffn_hidden_size",
        per_head_inputs=("alibi", "attention_mask"),
        groups="num_attention_heads",
        forms=(
            ("alibi", {"keeps_width": True}),
            ("parallel_attn", {"parallel": True}),
            ("multi_query", {"groups": 1, "attention_in": {"self_attention.query_key_value": "q kv kv"}}),
            (
                "new_decoder_architecture",
                {
                    "groups": "num_kv_heads",
                    "attention_in": BLOOM.attention_in,
                    "caches_queries": True,
                    "parallel": True,
                },
            ),
        ),
    ),
}
_IN_FILE = dict(FAMILIES)

OTHERS: dict[str, Facts] = {
    # Positions begin after the padding's id, as RoBERTa's.
    **dict.fromkeys(
        ("data2vec-text", "longformer", "luke", "roberta-prelayernorm", "xlm-roberta-xl", "xmod"),
        Facts(skipped_positions="padding"),
    ),
    "mixtral": Facts(packs=True),
    "gemma": Facts(packs=True),
    "olmo": Facts(packs=True),
    "hyperclovax": Facts(logit_powers={"logits_scaling": 1}),  # Granite divides by this field, HyperCLOVA X multiplies
    "mpt": Facts(logit_powers={"logit_scale": 0}),  # MPT has this field but does not use it
}
"""What is known about families without a row. They can learn and teach, but not be pruned."""

TEXT_ALONE = "its text model, saved alone (docs/reference/families.md shows how)"


class NotPrunable(ValueError):
    """A model that no row of the table describes: one line of what was `given` and what is `accepted`."""

    def __init__(self, given: str, accepted: str):
        self.given, self.accepted = given, accepted
        super().__init__(f"model: got {given}; accepted: {accepted}")


class Dims(NamedTuple):
    """Sizes of the original model's attention: channels per head, query heads, key-value heads (groups)."""

    head_size: int
    queries: int
    groups: int


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """The family row of a model or config.

    Raises:
        NotPrunable: the family has no row, or the model has parts that its row does not describe.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    if config.model_type not in FAMILIES:
        if (text := config.get_text_config().model_type) in FAMILIES:
            raise NotPrunable(f"family {config.model_type!r}", f"{text}, {TEXT_ALONE}")
        todo = (
            "To add a family, add a row with the names of its modules to FAMILIES in "
            "distill_llm/architectures/families.py, and its name to the tests"
        )
        if getattr(config, "pruning", None) is not None:
            todo = (
                "The model was pruned with a row that a script added: add the same row before you load it, "
                "to families.py beside the weights or, with distill_llm, to FAMILIES"
            )
        accepted = f"a family that `distill-llm families` lists. {todo}"
        raise NotPrunable(f"family {config.model_type!r}", accepted)
    if getattr(config, "add_cross_attention", False):
        raise NotPrunable(f"{config.model_type!r} with add_cross_attention", "a model without cross-attention")
    row = row_of(config)
    assert row is not None
    return row


def row_of(config: PreTrainedConfig) -> Family | None:
    """The row of a config's family in the form of this config; None if the family has no row. Does not check other parts."""
    row = FAMILIES.get(config.model_type)
    if row is None:
        return None
    for name, changes in row.forms:
        if getattr(config, name, False):
            row = replace(row, **changes)
    return row


def is_in_file(model_type: str) -> bool:
    """Whether this file holds the row of a family as it is now; a script may have added or changed it."""
    return _IN_FILE.get(model_type) == FAMILIES.get(model_type)


def facts_of(config: PreTrainedConfig) -> Facts:
    """What is known about a config's family, whether it can be pruned or not."""
    return row_of(config) or OTHERS.get(config.model_type) or Facts()


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers of any model: by its family's row, else the module list of the length that the config gives."""
    base = model.base_model
    if model.config.model_type in FAMILIES:
        path = FAMILIES[model.config.model_type].layers
        try:
            layers = base.get_submodule(path)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList):
            family, name = model.config.model_type, type(base).__name__
            raise ValueError(
                f"model: the row of family {family!r} does not fit it: {name} has no list {path!r} (layers)"
            )
        return layers
    count = model.config.get_text_config().num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"model: {type(model).__name__} has no module list of {count} layers")


def any_layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """As `layers_of`; empty where a family without a row has no one list of layers, such as that of a convolutional model."""
    try:
        return layers_of(model)
    except (AttributeError, ValueError):
        if model.config.model_type in FAMILIES:
            raise
        return nn.ModuleList()


def width_of(model: PreTrainedModel | PreTrainedConfig) -> int:
    """Channels of the residual stream of any model, pruned or not."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    lineage = lineage_of(config)
    if lineage is None or lineage.hidden is None:
        return config.get_text_config().hidden_size
    return len(lineage.hidden)


def dims_of(config: PreTrainedConfig) -> Dims:
    """Attention sizes of the original model, also if it was pruned since."""
    named = (row_of(config) or Family()).groups
    with stock_values(config):
        queries = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // queries
        # A field that the config's class does not know is not read by its attention either (GPT-2 with stray groups).
        known = isinstance(named, str) and hasattr(type(config), named)
        groups = named if isinstance(named, int) else (getattr(config, named) if known else None) or queries
        return Dims(head_size, queries, groups)
