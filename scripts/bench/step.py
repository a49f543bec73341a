"""What an optimizer step with all four losses costs, relative to a bare loop and to TextBrewer.

Part 1, in fp32 and in bf16. Every side trains a copy of the same half-pruned student on the same batches in the same
order, from the same DataLoader (the one `DistillationTrainer` builds, length grouping included), with fused AdamW and
SDPA:

- bare loop: teacher forward (no_grad, weights in the precision) + student forward with cross-entropy, backward,
  optimizer step. The floor. No clipping, no logging, no schedule.
- bare loop, clipped: the same with the gradient norm clipped to 1.0, as the Trainer does by default (with
  `max_grad_norm=0` it scales the gradients all the same, by 1).
- loop, <terms>: the bare loop with `DistillationTrainer.compute_loss` for the loss: what our terms cost without the
  Trainer. Each has the teacher forward.
- trainer: a whole `DistillationTrainer.train()` with all four terms, clipped and logged as by default.

An optimizer step's time runs from the end of one step to the end of the next, including data, schedule and
logging.

Part 2: examples per second of a whole `DistillationTrainer.train()` (bf16, fused AdamW, length grouping, SDPA) over
those of TextBrewer's `GeneralDistiller` (fp32, eager attention, default AdamW, shuffled batches padded to their longest
row) on the same rows and objective, with the same pairs of layers and heads. `--accuracy N` instead trains both once on
N rows and prints dev accuracy as well.
"""

import argparse
import copy
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import common
import torch
from textbrewer_side import textbrewer_training
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from distill_llm import DistillationConfig, DistillationTrainer
from distill_llm.data import GLUE
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.losses.objective import parse_objective

LOSSES: dict[str, dict[str, Any]] = {
    "labels": {"weight": 0.5},
    "logits": {"weight": 0.5, "temperature": 2.0},
    "hidden": {"weight": 1.0},
    "attention": {"weight": 1.0},
}
PEER_LOSSES = {
    **LOSSES,
    "attention": {"weight": 1.0, "distance": "mse"},
}  # TextBrewer has no divergence of probabilities
FLOOR = "bare loop"
CLIPPED = "bare loop, clipped"
SKIP = 2


class Bench:
    """Models, rows and options, and the training loops made of them."""

    def __init__(self, options: argparse.Namespace, examples: int):
        self.options = options
        self.setting = common.setting(options, examples)
        self.teacher = self.setting.teacher
        calibration = self.setting.batches(self.setting.rows[: options.calibration], options.batch_size)
        self.student = common.half_student(self.teacher, calibration)

    def trainer(self, losses: dict[str, Any], bf16: bool, **settings: Any) -> DistillationTrainer:
        """A new trainer of a copy of the student, for one epoch of the rows."""
        options = self.options
        config = DistillationConfig(
            output_dir=tempfile.gettempdir(),
            losses=losses,
            bf16=bf16,
            num_train_epochs=1,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=0.05,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = DistillationTrainer(
            copy.deepcopy(self.student),
            self.teacher,
            config,
            train_dataset=self.setting.rows,
            data_collator=self.setting.collate,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def step_sides(self, bf16: bool) -> dict[str, Callable[[], float]]:
        """The measurements of part 1 in one precision: seconds per step."""
        steps = -(-len(self.setting.rows) // self.options.batch_size)
        teacher = copy.deepcopy(self.teacher).to(torch.bfloat16 if bf16 else torch.float32)
        precision = torch.autocast(self.teacher.device.type, torch.bfloat16, enabled=bf16)

        def teacher_forward(batch: dict[str, torch.Tensor]) -> None:
            with torch.no_grad():
                teacher(**{name: value for name, value in batch.items() if name != "labels"})

        def plain(
            trainer: DistillationTrainer, model: PreTrainedModel
        ) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
            def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
                teacher_forward(batch)
                with precision:
                    return model(**batch).loss

            return loss

        def ours(
            trainer: DistillationTrainer, model: PreTrainedModel
        ) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
            prepared = trainer.accelerator.prepare_model(model)

            def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
                if trainer.teacher is None:
                    teacher_forward(batch)
                return trainer.compute_loss(prepared, batch)

            return loss

        def loop(make_loss: Callable, names: tuple[str, ...] = ("labels",), clip: bool = False) -> Callable[[], float]:
            def measure() -> float:
                trainer = self.trainer({name: LOSSES[name] for name in names}, bf16)
                model = trainer.model.train()
                loader, loss = trainer.get_train_dataloader(), make_loss(trainer, model)
                optimizer = torch.optim.AdamW(
                    model.parameters(), lr=self.options.learning_rate, weight_decay=0.0, fused=True
                )

                def train() -> None:
                    for batch in loader:
                        loss(batch).backward()
                        if clip:
                            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad()

                return common.seconds_per_step(train, steps, SKIP)

            return measure

        sides = {FLOOR: loop(plain), CLIPPED: loop(plain, clip=True)}
        sides |= {f"loop, {name}": loop(ours, (name,)) for name in LOSSES}
        sides["loop, all four"] = loop(ours, tuple(LOSSES))
        sides["trainer"] = lambda: common.seconds_per_step(self.trainer(LOSSES, bf16).train, steps, SKIP)
        return sides

    def ours(self) -> tuple[PreTrainedModel, Callable[[], Any]]:
        """Our side of part 2."""
        trainer = self.trainer(PEER_LOSSES, bf16=True)
        return trainer.model, trainer.train

    def textbrewer(self) -> tuple[PreTrainedModel, Callable[[], Any]]:
        """TextBrewer's side of part 2."""
        terms = self.trainer(PEER_LOSSES, bf16=False).terms
        return textbrewer_training(
            self.student,
            self.teacher,
            parse_objective(PEER_LOSSES),
            terms.pairs["hidden"],
            terms.pairs["attention"],
            self.setting,
            self.options.batch_size,
            self.options.learning_rate,
        )


def measure_steps(bench: Bench) -> dict[str, Any]:
    """Part 1."""
    results: dict[str, Any] = {}
    for name in bench.options.precision:
        sides = bench.step_sides(bf16=name == "bf16")
        wanted = (FLOOR, *(bench.options.only or sides))
        unknown = set(wanted) - set(sides)
        if unknown:
            raise SystemExit(f"--only: got {sorted(unknown)}; accepted: {', '.join(map(repr, sides))}")
        sides = {side: measure for side, measure in sides.items() if side in wanted}
        common.alternate(dict(list(sides.items())[:: max(1, len(sides) - 1)]), 1)  # warm-up, not counted
        times = common.alternate(sides, bench.options.rounds)
        common.print_table(
            f"Optimizer step, {name}: {bench.setting.text}, batch {bench.options.batch_size}", times, FLOOR
        )
        results[name] = {
            "ms": {side: round(1000 * statistics.median(values), 2) for side, values in times.items()},
            "over_floor": common.ratios(times, FLOOR),
        }
        if {CLIPPED, "trainer"} <= times.keys():
            found = common.ratio(times["trainer"], times[CLIPPED])
            print(f"trainer / {CLIPPED}: {found}")
            results[name]["trainer_over_clipped"] = asdict(found.rounded())
    return results


def measure_peer(bench: Bench) -> dict[str, Any]:
    """Part 2, speed alone."""
    times = common.alternate(
        {
            "ours": lambda: common.seconds(bench.ours()[1]),
            "textbrewer": lambda: common.seconds(bench.textbrewer()[1]),
        },
        bench.options.peer_rounds,
    )
    found = common.ratio(times["textbrewer"], times["ours"])
    rows = len(bench.setting.rows)
    speeds = {name: rows / statistics.median(values) for name, values in times.items()}
    print(
        f"Examples per second, ours / TextBrewer: {found}; medians {speeds['ours']:.0f} and {speeds['textbrewer']:.0f}"
    )
    return {"examples_per_second_over_textbrewer": asdict(found.rounded())}


def measure_accuracy(bench: Bench) -> dict[str, Any]:
    """Part 2 with accuracy: one training each on the same rows, then the dev set."""
    assert bench.setting.encoded is not None

    def accuracy(model: PreTrainedModel) -> float:
        data = bench.setting.encoded.test  # type: ignore[union-attr]
        return evaluate_model(model, data, GLUE["sst2"], bench.setting.collate, progress=False)["accuracy"]

    results: dict[str, Any] = {"teacher": accuracy(bench.teacher), "pruned": accuracy(bench.student)}
    speeds = {}
    for name, make in (("ours", bench.ours), ("textbrewer", bench.textbrewer)):
        model, train = make()
        speeds[name] = len(bench.setting.rows) / common.seconds(train)
        results[name] = accuracy(model)
    for name, value in results.items():
        speed = f", {speeds[name]:.0f} examples per second" if name in speeds else ""
        print(f"{name}: dev accuracy {value:.4f}{speed}")
    return {"accuracy": results, "examples_per_second_over_textbrewer": round(speeds["ours"] / speeds["textbrewer"], 4)}


def main() -> None:
    """Measure and print."""
    parser = common.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of part 1")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="sides of part 1 beside the bare loop (default: all)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a measurement")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--peer-rounds", type=int, default=3, help="rounds of part 2; 0 leaves it out")
    parser.add_argument("--calibration", type=int, default=256, help="rows that the student is pruned with")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--accuracy", type=int, metavar="N", help="part 2 with accuracy, on N rows; part 1 is left out")
    options = parser.parse_args()
    if options.accuracy and (options.teacher is None or options.data is None):
        parser.error("--accuracy needs --teacher and the SST-2 data")
    if options.steps <= SKIP:
        parser.error(f"--steps: more than {SKIP}, which are not counted")
    has_peer = importlib.util.find_spec("textbrewer") is not None
    if not has_peer:
        print("TextBrewer is not installed (pip install --no-deps -r scripts/bench/peers.txt): part 2 is left out")
    bench = Bench(options, options.accuracy or options.steps * options.batch_size)
    results: dict[str, Any] = {}
    if options.accuracy is None:
        results = measure_steps(bench)
    if has_peer and options.accuracy:
        results |= measure_accuracy(bench)
    elif has_peer and options.peer_rounds:
        results |= measure_peer(bench)
    common.print_json("step", options, bench.setting.text, results)


if __name__ == "__main__":
    main()
