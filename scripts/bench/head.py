"""What the loss of a language-model head costs, forward and backward, relative to the time of its four matrix products.

The loss is half the cross-entropy with the labels and half the forward KL from a teacher at temperature 2, over packed
tokens; weights and hidden states are random. The sides take turns, once all in fp32 and once all in bf16:

- four products: student logits, teacher logits, gradient of the hidden states, gradient of the weight, whole and into
  existing buffers. The floor.
- chunked head: `distill_llm.losses.chunked_head.head_losses`.
- dense: `label_loss` and `logits_divergence` on whole logits, by autograd.
- Liger: `LigerFusedLinearJSDLoss` at beta 0 (the same loss), not compiled, its own chunk size.
- TRL: `ChunkedDivergenceFunction` at beta 0; it has no label loss, so it does less.

Peers that are not installed are left out. Memory is the largest number of bytes that new tensors hold at once,
gradients included. On a machine that others use too, `--threads 1 --clock cpu` compares processor time.
"""

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import common
import torch

from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.head import Head
from distill_llm.losses.head_parts import Comparison, DivergencePart, LabelPart
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.measuring.counting import _LiveStorages

FLOOR = "four products"
TEMPERATURE = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case:
    """Random weights and hidden states of a student and a teacher, and the sides that run on them."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(options.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def normal(rows: int, columns: int, size: float) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator).mul_(size).to(device, dtype)

        self.tokens, vocabulary = options.tokens, options.vocabulary
        self.hidden = normal(self.tokens, options.hidden, 1.0).requires_grad_()
        self.weight = normal(vocabulary, options.hidden, options.hidden**-0.5).requires_grad_()
        self.teacher_hidden = normal(self.tokens, options.teacher_hidden, 1.0)
        self.teacher_weight = normal(vocabulary, options.teacher_hidden, options.teacher_hidden**-0.5)
        self.labels = torch.randint(vocabulary, (self.tokens,), generator=generator).to(device)

    def buffers(self) -> list[torch.Tensor]:
        """What the floor writes to."""
        logits = self.hidden.new_empty(self.tokens, len(self.weight))
        return [logits, torch.empty_like(logits), torch.empty_like(self.hidden), torch.empty_like(self.weight)]

    @torch.no_grad()
    def products(self, buffers: list[torch.Tensor]) -> None:
        """The floor."""
        logits, targets, of_hidden, of_weight = buffers
        torch.mm(self.hidden, self.weight.t(), out=logits)
        torch.mm(self.teacher_hidden, self.teacher_weight.t(), out=targets)
        torch.mm(logits, self.weight, out=of_hidden)
        torch.mm(logits.t(), self.hidden, out=of_weight)

    def chunked(self) -> torch.Tensor:
        """Ours."""
        half = 0.5 / self.tokens
        return head_losses(
            Head(self.weight),
            self.hidden,
            [
                LabelPart(self.labels, factor=half),
                DivergencePart(
                    Comparison(temperature=TEMPERATURE), Head(self.teacher_weight), self.teacher_hidden, factor=half
                ),
            ],
        ).total

    def dense(self) -> torch.Tensor:
        """Losses on whole logits."""
        logits, targets = self.hidden @ self.weight.t(), self.teacher_hidden @ self.teacher_weight.t()
        divergence = logits_divergence(logits, targets, "forward_kl", TEMPERATURE)
        return (0.5 * label_loss(logits, self.labels) + 0.5 * divergence).mean()

    def liger(self) -> torch.Tensor:
        """Liger's chunked loss; it does not multiply by the squared temperature."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        square = TEMPERATURE**2
        loss = LigerFusedLinearJSDLoss(0.5, 0.5 * square, beta=0.0, temperature=TEMPERATURE, compiled=False)
        return loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels)

    def trl(self) -> torch.Tensor:
        """TRL's chunked divergence."""
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        student, teacher = (self.hidden, self.weight, None), (self.teacher_hidden, self.teacher_weight, None)
        values, _ = ChunkedDivergenceFunction.apply(*student, *teacher, 0.0, TEMPERATURE)
        return 0.5 * TEMPERATURE**2 * values.mean()

    def step(self, loss: Callable[[], torch.Tensor]) -> float:
        """The loss, with its gradients made."""
        self.hidden.grad = self.weight.grad = None
        total = loss()
        total.backward()
        return total.item()

    def memory(self, loss: Callable[[], torch.Tensor]) -> int:
        """The largest number of bytes that the tensors of a step hold at once."""
        known = [self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels]
        with _LiveStorages(known) as live:
            self.step(loss)
        self.hidden.grad = self.weight.grad = None
        return live.peak


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Times over the floor, memory over dense, and losses, of every side in one precision."""
    case = Case(options, DTYPES[name])
    losses: dict[str, Callable[[], torch.Tensor]] = {"chunked head": case.chunked, "dense": case.dense}
    if find_spec("liger_kernel"):
        losses["Liger"] = case.liger
    if find_spec("trl"):
        losses["TRL"] = case.trl
    losses = {side: loss for side, loss in losses.items() if side not in options.without}
    memory = {side: case.memory(loss) for side, loss in losses.items()}
    values = {side: case.step(loss) for side, loss in losses.items()}
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    buffers = case.buffers()

    def timed(work: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            common.synchronize()
            begin = clock()
            work()
            common.synchronize()
            return clock() - begin

        return run

    sides = {FLOOR: timed(lambda: case.products(buffers))}
    sides |= {side: timed(lambda loss=loss: case.step(loss)) for side, loss in losses.items()}
    for side in sides.values():
        side()
    times = common.alternate(sides, options.rounds)
    common.print_table(f"{name}, {options.clock} time", times, FLOOR)
    found: dict[str, Any] = {"over_products": common.ratios(times, FLOOR), "losses": values}
    if "dense" in memory:
        found["memory_over_dense"] = {side: round(held / memory["dense"], 4) for side, held in memory.items()}
        for side, share in found["memory_over_dense"].items():
            print(f"{side}: {memory[side] / 1e6:,.0f} MB, {share:.3f} of dense; loss {values[side]:.5f}")
    return found


def main() -> None:
    """Both precisions, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the student")
    parser.add_argument("--teacher-hidden", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--without", nargs="*", default=[], help="sides to leave out")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(teacher=None, data=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {name: measure(options, name) for name in options.dtypes}
    results["peers"] = {name: version(name) for name in ("liger_kernel", "trl") if find_spec(name)}
    text = f"{options.tokens} random tokens, {options.vocabulary} classes, widths {options.hidden} and "
    common.print_json("head", options, text + f"{options.teacher_hidden}", results)


if __name__ == "__main__":
    main()
