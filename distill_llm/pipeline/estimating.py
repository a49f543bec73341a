"""`estimate`: a recipe's stages on paper, with the rate of this machine or a given one."""

from dataclasses import dataclass

import torch

from distill_llm.checks.estimate import Sketch, open_sketch
from distill_llm.checks.recipe import encoded_rows
from distill_llm.common.precision import AUTO
from distill_llm.measuring.profiling import device_name
from distill_llm.pipeline.estimate import Estimate
from distill_llm.pipeline.prices import Devices, Models, Rows, StageCost
from distill_llm.pipeline.work import measured_rate
from distill_llm.recipe.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        stages: in order.
        rate: floating point operations a second of a device.
        source: where the rate is from.
        rows: the run's rows.
    """

    stages: tuple[StageCost, ...]
    rate: float
    source: str
    rows: Rows

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.flops for stage in self.stages) / self.rate


def estimate(recipe: Recipe, devices: Devices, tflops: float | None = None, gpu: bool = True) -> Forecast:
    """Memory of a device and time of every stage of a recipe, with no weight read.

    The rows are tokenized as the run would, which keeps them. A training step goes through the run's own code with tensors
    that hold no numbers. Not counted: the memory of CUDA itself and of its libraries, fragmentation, generation of
    responses, reading and writing.

    Args:
        tflops: 10^12 floating point operations a second that a device reaches in training; None: measured here.
        gpu: whether the devices are GPUs.

    Raises:
        InputError: one line per fault of the recipe, or models too large to measure a rate with.
    """
    return forecast(open_sketch(recipe), devices, tflops, gpu)


def forecast(sketch: Sketch, devices: Devices, tflops: float | None = None, gpu: bool = True) -> Forecast:
    """The same for a recipe that is open."""
    recipe = _fast_in_bf16(sketch.opened.recipe) if gpu else sketch.opened.recipe
    fields = recipe.training("final" if recipe.distillation is not None else "teacher")
    rows = Rows.of(encoded_rows(sketch.opened), fields.get("per_device_train_batch_size", 8))
    models = Models(sketch.teacher, sketch.student, sketch.adapted, sketch.opened.teacher.tokenizer, sketch.peers)
    made = Estimate(recipe, models, rows, devices, gpu)
    stages = tuple(made.stages())
    if tflops is not None:
        return Forecast(stages, tflops * 1e12, "given", rows)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    return Forecast(stages, measured_rate(*made.trial(), device), f"measured on {device_name(device)}", rows)


def _fast_in_bf16(recipe: Recipe) -> Recipe:
    """The recipe as a GPU reads it, which this machine need not have: what is `auto` there is bf16."""
    plain = recipe.model_dump(mode="json")
    for fields in (plain["teacher"]["train"], plain["distillation"], plain["final"]):
        if fields and fields.get("bf16") == AUTO:
            fields["bf16"] = True
    if plain["pruning"] and plain["pruning"]["precision"] == AUTO:
        plain["pruning"]["precision"] = "bfloat16"
    return parse_recipe(plain)
