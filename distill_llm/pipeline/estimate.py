"""What a run will take, before it runs: memory of a device and time, stage by stage."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.common.precision import mixed_precision
from distill_llm.losses.objective import parse_objective
from distill_llm.measuring.tracing import Traced
from distill_llm.models.adapters import without_adapters
from distill_llm.models.exits import exits_in, with_exits
from distill_llm.pipeline.prices import (
    Devices,
    Models,
    Rows,
    StageCost,
    checkpointing_in,
    even_scores,
    gathered_bytes,
    held_bytes,
    optimizer_bytes,
    precision_of,
    resident_bytes,
    steps_of,
    weight_bytes,
)
from distill_llm.pipeline.rounds import kept_after
from distill_llm.pipeline.stages.prune import CALIBRATION_BATCH, CALIBRATION_TOKENS
from distill_llm.pipeline.stages.recover import without_exit_loss
from distill_llm.pipeline.work import Shape, Step, calibration, forward_pass, scoring
from distill_llm.pruning.cutting.strength import IN_ORDER
from distill_llm.pruning.cutting.surgery import prune_skeleton
from distill_llm.pruning.plan import full_plan, keep_layers
from distill_llm.pruning.planning.competing import plan_for_costs
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of, hidden_size, second_moment_bytes
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import Recipe, budget_batch

MEASURED_FORWARDS = 26
"""Forward passes of each model when the report measures both."""
FORWARDS_IN_ORDER = 2
"""Forward passes that a fit in order takes, at most: one of the model, and one of the student."""


class Estimate:
    """The costs of a recipe's stages.

    Args:
        recipe: a checked recipe.
        models, rows, devices: of the run.
        gpu: whether the devices are GPUs.
    """

    def __init__(self, recipe: Recipe, models: Models, rows: Rows, devices: Devices, gpu: bool = True):
        self.recipe, self.models, self.rows, self.devices, self.gpu = recipe, models, rows, devices, gpu

    def stages(self) -> Iterator[StageCost]:
        """Each stage of the run, in order."""
        recipe, teacher = self.recipe, self.models.teacher
        if recipe.teacher.train is not None:
            fields = recipe.training("teacher")
            yield self._training("teacher", self._labels_alone(teacher, fields), fields)
        else:
            yield self._scoring("teacher", teacher)
        section, rounds = recipe.pruning, self._rounds
        for number in range(1, rounds + 1):
            student = self._student(number)
            if section is not None and section.masks is not None:
                fields, whole = recipe.training("masks"), prune_skeleton(teacher, full_plan(teacher))
                yield self._training(f"round-{number}/masks", self._recovery(whole, fields), fields)
            if section is not None:
                yield self._pruning(f"round-{number}/prune", section, self._student(number - 1), student)
                yield from self._cut_peers()
            if recipe.distillation is not None:
                fields = recipe.training("final" if number == rounds else "recovery")
                learner = self._learner if number == rounds else student
                yield self._training(f"round-{number}/recover", self._recovery(learner, fields), fields)
        yield from self._generations()
        if recipe.quantize is not None and recipe.quantize.train is not None:
            fields = recipe.training("quantized")
            yield self._training("quantize/train", self._recovery(self._student(rounds), fields), fields)
        yield self._report(self._student(rounds))

    def trial(self) -> tuple[Step, Shape]:
        """The longest training's step, to measure a rate with: that of the last recovery, if there is one."""
        recipe = self.recipe
        if recipe.distillation is None:
            fields = recipe.training("teacher")
            step = self._labels_alone(self.models.teacher, fields)
        else:
            fields = recipe.training("final")
            step = self._recovery(self._learner, fields)
            if step.peers:  # each trains as one that is alone
                step = self._labels_alone(step.student, fields)
        return step, self._shape(fields)

    @property
    def _rounds(self) -> int:
        return self.recipe.pruning.rounds if self.recipe.pruning is not None else 1

    def _shape(self, fields: Mapping[str, Any]) -> Shape:
        return Shape(fields.get("per_device_train_batch_size", 8), self.rows.longest, self.rows.counted, self.gpu)

    def _labels_alone(self, model: nn.Module, fields: Mapping[str, Any]) -> Step:
        """A training step without a teacher in memory."""
        return Step(
            model,
            None,
            parse_objective({"labels": {}}),
            self.models.tokenizer,
            precision=precision_of(fields),
            checkpointing=checkpointing_in(fields),
            accumulated=fields.get("gradient_accumulation_steps", 1),
        )

    def _recovery(
        self, student: PreTrainedModel, fields: Mapping[str, Any], teacher: PreTrainedModel | None = None
    ) -> Step:
        """A training step of a student on a teacher: the recipe's, where none is given; or on its peers."""
        section, distillation = self.recipe.teacher, self.recipe.distillation
        step = self._labels_alone(self.models.adapted(student), fields)
        if distillation is None:
            return step
        losses = distillation.losses if exits_in(student) else without_exit_loss(distillation.losses)
        if not losses.needs_teacher or (section.cache is not None and teacher is None):
            own = losses.only([name for name in losses.terms() if name in ("labels", "exits")])
            return replace(step, objective=own) if exits_in(student) else step
        if section.peers is not None:
            return replace(step, peers=tuple(self._peers), objective=losses)
        dtype = getattr(torch, section.dtype) if section.dtype else step.precision or torch.float32
        return replace(step, teacher=teacher or self.models.teacher, objective=losses, teacher_dtype=dtype)

    @property
    def _learner(self) -> PreTrainedModel:
        """The student of the last recovery, with its exits: a copy, since a language model is marked in place."""
        student, exits = self._student(self._rounds), self.recipe.exits
        return student if exits is None else with_exits(copy.deepcopy(student), exits.after)

    @property
    def _peers(self) -> list[PreTrainedModel]:
        """Further students, given or cut."""
        section = self.recipe.teacher.peers
        shares = [other.keep for other in section.others] if section is not None else []
        return [self._cut(share) if share else given for share, given in zip(shares, self.models.peers, strict=True)]  # type: ignore[misc]

    def _student(self, number: int) -> PreTrainedModel:
        """The student after a round (0: before them), cut at random: the sizes count, not which units stay."""
        teacher, section = self.models.teacher, self.recipe.pruning
        if section is None or number == 0:
            return self.models.student or teacher
        if section.layers is not None:
            return prune_skeleton(teacher, keep_layers(teacher, section.layers))
        assert section.keep is not None
        return self._cut(kept_after(section.keep, number, section.rounds, section.schedule))

    def _cut(self, keep: float) -> PreTrainedModel:
        """The teacher with this share of its layers' cost."""
        teacher, section = self.models.teacher, self.recipe.pruning
        assert section is not None
        # Latency is measured; on paper the cost is that of parameters.
        costs = unit_costs(
            teacher, "params" if section.cost == "latency" else section.cost, *budget_batch(self.recipe, True)
        )
        return prune_skeleton(teacher, plan_for_costs(teacher, even_scores(teacher), keep, costs, section.rules))

    def _training(self, name: str, step: Step, fields: Mapping[str, Any]) -> StageCost:
        own, devices = without_adapters(step.student), self.devices
        accumulated, shape = step.accumulated, self._shape(fields)
        trace = step.traced(shape)
        weights: float = sum(map(weight_bytes, step.students))
        learned = sum(weight_bytes(student, learned=True) for student in step.students)
        if own is not step.student and self.recipe.student and self.recipe.student.quantization is not None:
            weights = held_bytes(own, step.precision or torch.float32, self.recipe.student.quantization)
        parts: dict[str, float] = {
            "weights": weights,
            "optimizer": learned / 4 * optimizer_bytes(str(fields.get("optim", "adamw"))),
        }
        whole = devices.sharing == "ddp" or devices.count == 1
        if whole:
            accumulating = trace.gradients + trace.ungraded if accumulated > 1 else 0
            parts["gradients and batch"] = max(trace.peak, accumulating)
            if devices.count > 1:
                parts["buckets"] = learned
        elif step.peers:
            raise InputError("accelerate", devices.sharing, "ddp: peers learn in whole models")
        else:
            parts = {part: held / devices.count for part, held in parts.items()}
            parts |= {"gradients": learned / devices.count, "gathered": gathered_bytes(own, step.precision)}
            parts["batch"] = trace.activations
        if step.teacher is not None:
            parts["teacher"] = held_bytes(step.teacher, step.teacher_dtype, self.recipe.teacher.quantization)
        micro = steps_of(fields, self.rows.train, shape.rows * accumulated * devices.count) * accumulated
        flops = micro * trace.flops * self.rows.padded / self.rows.longest
        return StageCost(name, parts, flops + sum(self._scored(each).flops for each in (own, *step.peers)))

    def _cut_peers(self) -> Iterator[StageCost]:
        """Peers are cut by the statistics of the student's own cut, and scored."""
        for number, (peer, given) in enumerate(zip(self._peers, self.models.peers, strict=True), 1):
            if given is None:
                scored = self._scored(peer)
                models = weight_bytes(self.models.teacher) + weight_bytes(peer)
                parts = {"models": models, "batch": scored.parts["batch"]}
                yield StageCost(f"round-1/prune-peer-{number}", parts, scored.flops)

    def _generations(self) -> Iterator[StageCost]:
        """From the second on, each is taught by one of its own shape; then all are scored together, where that is asked for."""
        section, rounds = self.recipe.distillation.generations if self.recipe.distillation else None, self._rounds
        if section is None:
            return
        student, fields = self._student(rounds), self.recipe.training("final")
        for number in range(2, section.count + 1):
            step = self._recovery(student, fields, student)
            yield self._training(f"round-{rounds}/generation-{number}", step, fields)
        if section.ensemble:
            scored = self._scored(student)
            parts = {"models": section.count * weight_bytes(student, student.dtype), "batch": scored.parts["batch"]}
            yield StageCost(f"round-{rounds}/generations", parts, section.count * scored.flops)

    def _scoring(self, name: str, model: PreTrainedModel) -> StageCost:
        scored = self._scored(model)
        return StageCost(name, {"weights": weight_bytes(model, model.dtype), **scored.parts}, scored.flops)

    def _scored(self, model: PreTrainedModel) -> StageCost:
        """A pass over the test rows, by one process."""
        size = min(self.recipe.evaluation.batch_size, self.rows.test)
        trace = scoring(model, Shape(size, max(8, round(self.rows.scored)), self.rows.counted, self.gpu))
        return StageCost("scores", {"batch": trace.peak}, trace.flops * self.rows.test / size)

    def _pruning(
        self, name: str, section: PruningSection, before: PreTrainedModel, after: PreTrainedModel
    ) -> StageCost:
        examples = section.calibration_examples
        examples = examples if section.calibration else min(examples, self.rows.train)
        size = max(1, min(CALIBRATION_BATCH, CALIBRATION_TOKENS // self.rows.longest, examples))
        others = [] if before is self.models.teacher else [self.models.teacher]
        held = sum(map(weight_bytes, (before, after, *others)))
        scored = self._scored(after)
        scoring_parts = {"models": weight_bytes(after, after.dtype), "batch": scored.parts["batch"]}
        if section.offload:  # what is outside the layers, and a layer at a time
            held = resident_bytes(before)
        else:
            scoring_parts["models"] += weight_bytes(before)
        batches = math.ceil(examples / size / self.devices.count)
        parts: dict[str, float] = {"models": held, "batch": 0}
        flops = scored.flops * (2 if section.folds or section.scales else 1)
        if section.layers is None and section.masks is None:
            trace = self._calibration(section, before, size)
            parts["batch"], passes = trace.peak, 1
            if section.folds and section.moment_layers is not None:
                every, layers = second_moment_bytes(before), len(counts_of(before))
                parts["second moments"] = every * min(1.0, section.moment_layers / layers)
                passes += math.ceil(layers / section.moment_layers)
            flops += passes * trace.flops * batches * self.rows.padded / self.rows.longest
        if section.compensate == "in_order":  # each strength that is tried, and the one that is taken once more
            flops += (len(IN_ORDER) + 1) * FORWARDS_IN_ORDER * self._forward(section, before, size) * batches
            if not self.gpu:  # they are in main memory
                most = max(2 * hidden_size(before), *(counts["neurons"] for counts in counts_of(after)))
                values = (2 * hidden_size(before) + most) * self.rows.padded
                parts["residual streams"] = 4 * values * examples / self.devices.count
        if section.scales is not None:  # a backward pass without gradients of weights is as much as a forward pass
            step = self._forward(section, before, size) + 2 * self._forward(section, after, size)
            flops += section.scales.steps * step / self.devices.count
        fuller = max(parts, scoring_parts, key=lambda each: sum(each.values()))
        return StageCost(name, fuller, flops)

    def _forward(self, section: PruningSection, model: PreTrainedModel, size: int) -> float:
        """Operations of a forward pass over a batch of calibration rows."""
        settings = CalibrationSettings(moments=False, hidden=False, precision=mixed_precision(section.precision))
        traced = calibration(model, None, settings, Shape(size, self.rows.longest, self.rows.counted, self.gpu))
        return traced.flops * self.rows.padded / self.rows.longest

    def _calibration(self, section: PruningSection, model: PreTrainedModel, size: int) -> Traced:
        """A batch of calibration, with the statistics that it adds to."""
        settings = CalibrationSettings(
            moments=section.holds_moments,
            moment_share=section.moment_share,
            hidden=False,
            weight_gradients=section.needs("weight_gradients"),
            precision=mixed_precision(section.precision),
            checkpointing=section.checkpointing,
        )
        loss = "labels" if section.needs("gradients") else None
        return calibration(model, loss, settings, Shape(size, self.rows.longest, self.rows.counted, self.gpu))

    def _report(self, student: PreTrainedModel) -> StageCost:
        latency, teacher = self.recipe.evaluation.latency, self.models.teacher
        shape = Shape(latency.batch_size, latency.sequence_length, gpu=self.gpu)
        traces = [forward_pass(model, shape) for model in (teacher, student)]
        models = sum(weight_bytes(model, model.dtype) for model in (teacher, student))
        parts = {"models": models, "batch": max(trace.peak for trace in traces)}
        return StageCost("report", parts, MEASURED_FORWARDS * sum(trace.flops for trace in traces))
