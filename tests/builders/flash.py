"""Flash attention without its package: transformers' own code around it, and its functions in plain torch."""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flash_attention


def _attend(query, key, value, causal=False, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1)):
    """(B, T, N, D) each, keys and values of fewer heads; half precision alone, as the kernel has it."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    groups = query.shape[2] // key.shape[2]
    key, value = (each.repeat_interleave(groups, 2) for each in (key, value))
    mask, length = None, query.shape[1]
    if causal:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask = mask.triu(-window_size[0]) if window_size[0] >= 0 else mask
    heads_first = (each.transpose(1, 2) for each in (query, key, value))
    return scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=softmax_scale).transpose(1, 2)


def _attend_each(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    causal=False, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1),
):  # fmt: skip
    """The same of sequences one after another, (all tokens, N, D)."""
    settings, spans = (causal, softmax_scale, dropout_p, window_size), pairwise(cu_seqlens_q.tolist())
    return torch.cat([_attend(*(each[None, a:b] for each in (query, key, value)), *settings)[0] for a, b in spans])


def with_flash(model, monkeypatch):
    """A model that asks for flash_attention_2, which is what the functions above stand for."""

    def functions(implementation, *args, **settings):
        if implementation != "flash_attention_2":
            raise ValueError(f"no kernel is called {implementation}")
        kernels = _attend, _attend_each, None, flash_utils._pad_input, flash_utils._unpad_input
        return kernels, (flash_utils._lazy_define_process_function(_attend_each), dict)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", functions)
    monkeypatch.setattr(flash_attention, "_use_top_left_mask", False)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    return model
