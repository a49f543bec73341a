"""A scheme: how many bits a weight gets and how its scale is found. Needs no torch, so that recipes can hold one."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from distill_llm.common.errors import InputError

INSTALL = "install torchao (pip install 'distill_llm[quantize]')"
BITS = (8, 4)


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of a model are rounded.

    A weight w is stored as a whole number q = round(w / s) + z between -2^(b-1) and 2^(b-1) - 1; it stands for s (q - z). Each
    row of a weight matrix, or each group of neighbours in a row, has a scale s and a zero point z of its own (Jacob et al.,
    2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference).

    Attributes:
        bits: b, 8 or 4.
        activations: whether inputs of linear layers are rounded too, to 8 bits, a scale and zero point for each token, found
            while the model runs.
        symmetric: whether z is 0 for all weights; otherwise the range of a row, from its least to its largest weight, is used
            whole.
        group_size: neighbours in a row that share s and z; None: the whole row.
        smooth: the exponent alpha by which SmoothQuant (Xiao et al., 2023) moves the range of activations into the weights; None:
            it does not.
    """

    bits: int
    activations: bool = False
    symmetric: bool = True
    group_size: int | None = None
    smooth: float | None = None

    def faults(self, prefix: str = "") -> list[InputError]:
        """What contradicts itself, each under its field after `prefix`; and where torchao is missing."""
        return list(self._faults(f"{prefix}." if prefix else ""))

    def _faults(self, before: str) -> Iterator[InputError]:
        if self.bits not in BITS:
            yield InputError(f"{before}bits", self.bits, "8 or 4")
        if self.group_size is not None and self.group_size < 2:
            yield InputError(f"{before}group_size", self.group_size, "2 or more weights, or none given: a whole row")
        if self.smooth is not None:
            field = f"{before}smooth"
            if not 0 <= self.smooth <= 1:
                yield InputError(field, self.smooth, "a number from 0 to 1; 0.5 is usual")
            elif self.bits != 8 or not self.activations or not self.symmetric or self.group_size is not None:
                fix = "remove it: SmoothQuant is for 8 bits with activations, symmetric, a scale for each row"
                yield InputError(field, self.smooth, fix=fix)
        if importlib.util.find_spec("torchao") is None:
            yield InputError(f"{before}bits", self.bits, fix=f"{INSTALL}, or remove it")

    def learning_faults(self, field: str) -> list[InputError]:
        """What a student cannot learn under: torchao imitates no other zero points, and what is smoothed is calibrated.

        Args:
            field: what asks for the training.
        """
        if self.symmetric and self.smooth is None:
            return []
        what = "symmetric: false" if not self.symmetric else f"smooth: {self.smooth}"
        return [InputError(field, what, fix="remove either: training imitates symmetric rounding without smoothing")]

    @property
    def words(self) -> str:
        """The scheme in words, to print."""
        scales = "row" if self.group_size is None else f"group of {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        parts = [f"weights in {self.bits} bits, {kind}, a scale for each {scales}"]
        if self.activations:
            parts.append("activations in 8 bits, a scale for each token")
        if self.smooth is not None:
            parts.append(f"smoothed with alpha {self.smooth:g}")
        return "; ".join(parts)
