"""What a distillation step of a causal LM costs over its floor, in time and memory.

SmolLM2-135M teaches its own first 20 layers on 2 x 512 tokens, fused AdamW, SDPA, the same batch for every side, the sides' steps
alternating one by one:

- floor: teacher forward (no_grad, weights in the precision) and the student's cross-entropy step.
- ours: `DistillationTrainer`'s loss with labels and forward KL in place of the cross-entropy; `ours, relations`,
  `ours, attention` and `ours, both` with these terms of the last layer beside.
- dense: forward KL of whole logits, as most tools have it.
- liger: Liger's chunked JSD loss of a teacher's and a student's last hidden states (not compiled).
- trl: the loss of TRL's `GKDTrainer` (JSD of whole logits); trl chunked: that of its `DistillationTrainer` (forward KL).
  Neither has a label loss, so they do less.

Peers that are not installed are left out.

Peak memory is that of a process of its own, three steps, above what it held when the models were loaded.

    python scripts/bench/causal_step.py --model DIR       # DIR: made by scripts/data/smollm2.py
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill_llm import DistillationConfig, DistillationTrainer, keep_layers, prune

FLOOR = "floor"
OURS = {
    "ours": {},
    "ours, relations": {"relations": {"heads": 3}},
    "ours, attention": {"attention": {"layers": "last"}},
    "ours, both": {"relations": {"heads": 3}, "attention": {"layers": "last"}},
}
PEERS = {"liger": "liger_kernel", "trl": "trl", "trl chunked": "trl"}
Step = Callable[[], None]


def models(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Teacher and student."""
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    layers = list(range(options.layers))
    return teacher, prune(teacher, keep_layers(teacher, layers)).train()


def step_of(side: str, teacher: PreTrainedModel, student: PreTrainedModel, options: argparse.Namespace) -> Step:
    """One optimizer step of a side, on a copy of the student."""
    bf16 = options.precision == "bf16"
    student = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(student.config.vocab_size, (options.batch_size, options.length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    loss = ours(side, teacher, student, options) if side in OURS else peer(side, teacher, student, bf16)

    def step() -> None:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    side: str, teacher: PreTrainedModel, student: PreTrainedModel, options: argparse.Namespace
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The trainer's loss of a batch."""
    config = DistillationConfig(
        output_dir=tempfile.gettempdir(),
        losses={"labels": {"weight": 0.5}, "logits": {"weight": 0.5}, **OURS[side]},
        bf16=options.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = DistillationTrainer(student, teacher, config)
    model = trainer.accelerator.prepare_model(student)
    return lambda batch: trainer.compute_loss(model, batch)


def peer(
    side: str, teacher: PreTrainedModel, student: PreTrainedModel, bf16: bool
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """The floor, and what others do."""
    teacher = copy.deepcopy(teacher).to(torch.bfloat16 if bf16 else torch.float32)
    precision = torch.autocast(student.device.type, torch.bfloat16, enabled=bf16)

    def floor(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            teacher(input_ids=batch["input_ids"], use_cache=False)
        with precision:
            return student(**batch, use_cache=False).loss

    def dense(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        with precision:
            output = student(**batch, use_cache=False)
        log_p = target.float().log_softmax(-1).flatten(0, 1)
        log_q = output.logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
        return 0.5 * output.loss + 0.5 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def liger(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        function = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, compiled=False)
        own, seen = last_states(batch)
        cast = torch.bfloat16 if bf16 else torch.float32
        with precision:
            weight = student.lm_head.weight.to(cast)
            found = function(
                own.to(cast), weight, seen.to(cast), teacher.lm_head.weight, batch["labels"][:, 1:].flatten()
            )
        return found[0] if isinstance(found, tuple) else found

    def trl(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from trl.experimental.gkd import GKDTrainer

        with torch.no_grad():
            target = teacher(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        with precision:
            logits = student(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            return GKDTrainer.generalized_jsd_loss(logits, target, batch["labels"][:, 1:], beta=0.5, temperature=0.9)

    def trl_chunked(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        own, seen = last_states(batch)
        heads = (student.lm_head.weight, None), (teacher.lm_head.weight, None)
        with precision:
            values, _ = ChunkedDivergenceFunction.apply(own, *heads[0], seen, *heads[1], 0.0, 1.0)
        return values.mean()

    def last_states(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, hidden) of the student and of the teacher."""
        with torch.no_grad():
            seen = teacher.model(batch["input_ids"], use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        with precision:
            own = student.model(batch["input_ids"], use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        return own, seen

    return {FLOOR: floor, "dense": dense, "liger": liger, "trl": trl, "trl chunked": trl_chunked}[side]


def memory(side: str, options: argparse.Namespace) -> None:
    """Print the MB that three steps need above what the process holds once the models are loaded."""
    teacher, student = models(options)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held: loading had its own
    before = high_water_mb()
    step = step_of(side, teacher, student, options)
    for _ in range(3):
        step()
    print(json.dumps({"mb": high_water_mb() - before, "models": before}))


def high_water_mb() -> float:
    """The most memory this process has held (of its own: what getrusage says begins at its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Times side by side, then memory, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--layers", type=int, default=20, help="of the student: the teacher's first")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", nargs="+", default=[FLOOR, *OURS, "dense", *PEERS])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory_of:
        memory(options.memory_of, options)
        return
    options.sides = [side for side in options.sides if side not in PEERS or find_spec(PEERS[side])]
    teacher, student = models(options)
    steps = {side: step_of(side, teacher, student, options) for side in options.sides}
    for step in steps.values():
        step()  # warm-up
    times = common.alternate(
        {side: lambda step=step: common.seconds(step) for side, step in steps.items()}, options.rounds
    )
    title = f"Step of {options.batch_size} x {options.length} tokens, {options.precision}"
    common.print_table(title, times, FLOOR)
    results: dict[str, Any] = {"over_floor": common.ratios(times, FLOOR)}
    extras = {side: seconds for side, seconds in times.items() if side in OURS}
    if len(extras) > 1:
        common.print_table("The terms beside labels and logits", extras, "ours")
        results["over_ours"] = common.ratios(extras, "ours")
    if not options.no_memory:
        results["peak_mb"] = {side: peak_of(side) for side in options.sides}
        print("peak memory above the loaded models, MB:", results["peak_mb"])
    options.teacher = None
    common.print_json("causal_step", options, f"{options.batch_size} x {options.length} random tokens", results)


def peak_of(side: str) -> float:
    """Of a process of its own."""
    command = [sys.executable, *sys.argv, "--memory-of", side]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    return round(json.loads(lines[-1])["mb"])


if __name__ == "__main__":
    main()
