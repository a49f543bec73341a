"""Which precision a device computes fast in."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""What a recipe says in place of true or of a dtype: bf16 where the device is fast in it, else fp32."""


def fast_bf16(device: "torch.device | None" = None) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones on a device; None: the accelerator, or the CPU if there is none.

    A CPU without instructions for bf16 (AVX512-BF16 or AMX) computes in it all the same, ten to seventy times slower.
    """
    import torch

    kind = device.type if device is not None else "cpu"
    if device is None and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # no public word for it
    return torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else kind == "xpu"


def mixed_precision(name: str | None, device: "torch.device | None" = None) -> "torch.dtype | None":
    """The dtype that a recipe's `precision` means on a device; None: no mixed precision."""
    import torch

    if name == AUTO:
        return torch.bfloat16 if fast_bf16(device) else None
    return None if name is None else getattr(torch, name)
