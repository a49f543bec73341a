"""Rows that several families of the table share in part (see `families.py`).

Checkpoints of pruned models hold a copy of this file.
"""

from dataclasses import replace

from .family import Family


def projections(names: str, prefix: str = "self_attn.", **more: str) -> dict[str, str]:
    """Layouts of separate query, key and value modules ("q_proj k_proj v_proj"). `more`: other paths, with __ for each dot."""
    layouts = dict(zip((prefix + name for name in names.split()), ("q", "kv", "kv"), strict=True))
    return layouts | {prefix + path.replace("__", "."): layout for path, layout in more.items()}


PARALLEL = (("use_parallel_residual", {"parallel": True}),)
"""The config says whether attention and FFN are parallel."""

BERT = Family(
    layers="encoder.layer",
    attention="attention.self",
    attention_in=projections("query key value", "attention.self."),
    attention_out="attention.output.dense",
    ffn_in={"intermediate.dense": "n"},
    ffn_out="output.dense",
    normed_after=True,
)
ROBERTA = replace(BERT, mlm_head="lm_head", skipped_positions="padding")
LLAMA = Family(
    attention_in=projections("q_proj k_proj v_proj"),
    ffn_in={"mlp.gate_proj": "n", "mlp.up_proj": "n"},
    stock=("heads", "queries", "neurons", "layers", "hidden"),
    packs=True,
)
# Embeddings are scaled by the width in the config, so a stock config cannot have fewer channels.
GEMMA = replace(LLAMA, stock=LLAMA.stock[:-1], dividing=True, normed_after=True)
NEOX = Family(
    attention="attention",
    attention_in={"attention.query_key_value": "(q kv kv)"},
    attention_out="attention.dense",
    ffn_in={"mlp.dense_h_to_4h": "n"},
    ffn_out="mlp.dense_4h_to_h",
)
BLOOM = replace(
    NEOX,
    layers="h",
    attention="self_attention",
    attention_in={"self_attention.query_key_value": "(q kv kv)"},
    attention_out="self_attention.dense",
)
