"""Relations between tokens by their queries, keys or values: what models of any width and head count have in common."""

import torch

from distill_llm.losses.attention import AttentionInputs, attention_distance
from distill_llm.losses.relation_heads import relation_heads


def relation_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
    heads: int | None = None,
    field: str = "losses.relations.heads",
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over valid tokens of the mean over relation heads of KL(teacher || student) (MiniLMv2, Wang et al., 2021, section 3).

    The vectors of all heads of a token, one after the other, are divided into `heads` relation heads of d channels each;
    a relation is softmax(x x^T / sqrt(d)) over the valid tokens of the same sequence. Later tokens count in the relations
    of a causal model too: they are looked at, never predicted from.

    Args:
        student: (B, N, T, D) queries, keys or values of a layer.
        teacher: (B, N', T, D') the same of the mapped layer, no gradient.
        valid: (B, T), 1 at valid tokens and 0 at padding.
        heads: divides N * D and N' * D'; None: the most that do, up to MOST_HEADS.
        field: what the number of heads is called in error messages.
        sequences: (B, T) of packed rows, the number of each token's sequence; None: a sequence per row.

    Returns:
        scalar in fp32.

    Raises:
        InputError: the widths cannot be divided.
    """
    heads = relation_heads(heads, {each.shape[1] * each.shape[3] for each in (student, teacher)}, field)
    lowest = torch.finfo(torch.float32).min
    hidden = (valid == 0)[:, None, None, :]
    if sequences is not None:
        hidden = hidden | (sequences[:, None, :, None] != sequences[:, None, None, :])
    bias = torch.zeros(hidden.shape, device=valid.device).masked_fill_(hidden, lowest)

    def relation(vectors: torch.Tensor) -> AttentionInputs:
        divided = vectors.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
        return AttentionInputs(divided, divided, divided.shape[-1] ** -0.5, bias)

    return attention_distance(relation(student), relation(teacher), valid)
