"""Tiny models of every family and the plans that its gate is tried with."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from distill_llm.pruning.plan import LayerPlan, PruningPlan

HEADS = {
    "base": AutoModel,
    "token-classification": AutoModelForTokenClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "multiple-choice": AutoModelForMultipleChoice,
    "image-classification": AutoModelForImageClassification,
}
LAYERS, HIDDEN, QUERIES, GROUPS, NEURONS = 5, 32, 8, 4, 64
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "ernie": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 16},
    "distilbert": {},
    "mpnet": {},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
}
# Of images: eight patches and a token in front of them.
IMAGES: dict[str, dict[str, Any]] = {"vit": {"image_size": [6, 12], "patch_size": 3, "num_channels": 2}}
GROUPED: dict[str, Any] = {"num_key_value_heads": GROUPS}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 8},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 8},
    "smollm3": GROUPED | {"no_rope_layer_interval": 2},
    "granite": GROUPED | {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "olmo2": GROUPED,
    "cohere": GROUPED | {"use_qk_norm": True},
    # Two of a head's four channels rotate: by default it would be one, which has no pair.
    "stablelm": GROUPED
    | {
        "qk_layernorm": True,
        "use_qkv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "starcoder2": GROUPED,
    "phi": GROUPED,
    "phi3": GROUPED,
    "opt": {"word_embed_proj_dim": HIDDEN, "ffn_dim": NEURONS},
    "gpt2": {"n_inner": NEURONS},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {"multi_query": False, "new_decoder_architecture": False},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "electra-as-wide": ("electra", {"embedding_size": HIDDEN}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": GROUPS}),
    "falcon-multi-query": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon-alibi": ("falcon", {"multi_query": False, "alibi": True}),
    "deberta-v2-shared": ("deberta-v2", {**ENCODERS["deberta-v2"], "share_att_key": True}),
    "deberta-v2-convolution": ("deberta-v2", {**ENCODERS["deberta-v2"], "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-v3": (
        "deberta-v2",
        {**ENCODERS["deberta-v2"], "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    ),
    "opt-350m": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": NEURONS, "do_layer_norm_before": False}),
    "stablelm-parallel": ("stablelm", {**DECODERS["stablelm"], "use_parallel_residual": True}),
    "phi3-longrope": (
        "phi3",
        {
            "num_key_value_heads": GROUPS,
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "original_max_position_embeddings": 8,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.0, 2.0],
            },
        },
    ),
    "gpt2-scaled": ("gpt2", {"n_inner": NEURONS, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": NEURONS}),
    "llama-many-heads": ("llama", {"num_key_value_heads": QUERIES, "attention_bias": True, "mlp_bias": True}),
    "llama-one-group": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
}
EVERY = [*ENCODERS, *DECODERS, *VARIANTS]
"""All that read tokens; those of images are in IMAGES."""


def head_of(family: str) -> str:
    """The head that tiny models of a family have where none is asked for."""
    return (
        "causal-lm" if family in DECODERS else "image-classification" if family in IMAGES else "sequence-classification"
    )


def family_model(name: str, head: str | None = None, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A random model in eval mode: 5 layers, width 32, 8 query heads (4 key-value heads where the family has groups)."""
    family, own = VARIANTS.get(name, (name, None))
    own = own if own is not None else {**ENCODERS, **DECODERS, **IMAGES}.get(name)
    head = head or head_of(family)
    sizes = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": QUERIES,
        "intermediate_size": NEURONS,
        "max_position_embeddings": 64,
    }
    if family == "distilbert":
        sizes |= {"n_layers": LAYERS, "dim": HIDDEN, "n_heads": QUERIES, "hidden_dim": NEURONS}
    tokens = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family in IMAGES:
        del sizes["max_position_embeddings"]
        tokens = {}
    config = AutoConfig.for_model(family, **{**sizes, **tokens, "num_labels": 3, **(own or {}), **more})
    torch.manual_seed(seed)
    model = HEADS[head].from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


def family_batch(
    model: PreTrainedModel, batch: int = 3, length: int = 12, seed: int = 0, left: bool = False
) -> dict[str, torch.Tensor]:
    """Token ids padded to uneven lengths, on the right or on the `left`, and their mask; or images, and masks of patches."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type in IMAGES:
        height, width = model.config.image_size
        images = torch.randn(batch, model.config.num_channels, height, width, generator=generator)
        mask = torch.ones(batch, 9, dtype=torch.long)
        for row in range(1, batch):
            mask[row, 9 - 2 * row :] = 0
        return {"pixel_values": images, "attention_mask": mask}
    shape = (batch, 2, length) if "MultipleChoice" in type(model).__name__ else (batch, length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, ..., slice(3 * row) if left else slice(length - 3 * row, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def outputs_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model gives at valid tokens, flattened."""
    with torch.no_grad():
        output = model(**batch)
    found = output.logits if "logits" in output else output[0]
    if "start_logits" in output:
        found = torch.stack([output.start_logits, output.end_logits], -1)
    if found.dim() == 3:
        found = found[batch["attention_mask"].bool()]
    return found.flatten()


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights copied: where weights lie in a file's memory changes how sums are rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding in fp32: within 1e-5 of the largest value."""
    worst, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    assert worst <= 1e-5 * max(scale, 1.0), f"differs by {worst:.1e} at a scale of {scale:.1e}"


def groups_of(model: PreTrainedModel) -> int:
    """Key-value heads of a tiny model."""
    config = model.config
    if config.model_type == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else QUERIES
    return getattr(config, "num_key_value_heads", None) or QUERIES


def neurons_of(model: PreTrainedModel) -> int:
    """Neurons of a tiny model's layer."""
    return 4 * HIDDEN if model.config.model_type in ("bloom", "falcon") else NEURONS


def narrows(model: PreTrainedModel) -> bool:
    """Whether channels of the residual stream can go: no convolution reads them."""
    return getattr(model.config, "conv_kernel_size", 0) == 0


def uneven_plan(model: PreTrainedModel, hidden: bool = False, queries: bool = False) -> PruningPlan:
    """Every layer another size: layer 2 is gone, layer 1 has no attention, layer 3 no FFN."""
    groups, neurons = groups_of(model), neurons_of(model)
    shared = QUERIES // groups
    some = (0,) if groups == 1 else (1, 3) if groups > 3 else (1,)

    def of(heads: tuple[int, ...]) -> tuple[int, ...] | None:
        # another one of every group
        return tuple(h * shared + h % shared for h in heads) if queries and shared > 1 and heads else None

    rows = [
        LayerPlan(0, some, tuple(range(5, 40)), of(some)),
        LayerPlan(1, (), tuple(range(0, neurons, 3))),
        LayerPlan(3, tuple(range(groups)), (), of(tuple(range(groups)))),
        LayerPlan(4, (groups // 2,), (7, 8, neurons - 1), of((groups // 2,))),
    ]
    channels = tuple(c for c in range(HIDDEN) if c % 5) if hidden and narrows(model) else None
    return PruningPlan(model.config.model_type, tuple(rows), hidden=channels)


def uniform_plan(model: PreTrainedModel, units: str) -> PruningPlan:
    """Every layer the same: fewer of one kind of unit, or fewer layers."""
    groups, neurons, every = groups_of(model), neurons_of(model), range(LAYERS)
    shared, heads, queries = QUERIES // groups, tuple(range(groups)), None
    if units == "heads":
        heads = (0, groups - 1)
    if units == "queries":
        queries = tuple(range(0, QUERIES, 2))
    kept = tuple(range(0, neurons, 2) if units == "neurons" else range(neurons))
    assert units != "queries" or shared > 1
    rows = [LayerPlan(i, heads, kept, queries) for i in every if units != "layers" or i not in (2, 3)]
    channels = tuple(c for c in range(HIDDEN) if c % 4) if units == "hidden" else None
    return PruningPlan(model.config.model_type, tuple(rows), hidden=channels)
