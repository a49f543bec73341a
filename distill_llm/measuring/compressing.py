"""What a model's weights take after compression: zeros take almost nothing then."""

import zlib

import torch
from torch import nn

CHUNK = 1 << 20
MOST = 64
"""Megabytes that are compressed at most; of larger models, as many pieces spread evenly over each tensor."""
LEVEL = 1
"""Of zlib, the fastest."""


def compressed_share(model: nn.Module) -> float:
    """The bytes of a model's weights after zlib (level 1), as a share of what they were; of large models by a sample.

    Random weights in fp32 hardly compress, so a share of zeros is nearly what is saved. Files are not written; a file system or
    an archive that compresses comes to about the same.
    """
    whole = {id(each): each.data for each in (*model.parameters(), *model.buffers())}
    tensors = [part for each in whole.values() for part in _parts(each)]
    total = sum(each.numel() * each.element_size() for each in tensors)
    if not total:
        return 1.0
    share, before, after = min(1.0, MOST * CHUNK / total), 0, 0
    for each in tensors:
        data = each.detach().contiguous().cpu().flatten().view(torch.uint8)
        for start in range(0, len(data), max(CHUNK, round(CHUNK / share))):
            piece = data[start : start + CHUNK].numpy().tobytes()
            before += len(piece)
            after += len(zlib.compress(piece, LEVEL))
    return after / before if before else 1.0


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or the plain tensors in which one of fewer bits is kept."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
