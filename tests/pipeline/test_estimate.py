"""What a run will take: the bytes of each stage by hand, the table, and what is refused."""

import copy
import re

import pytest
import torch
from builders.models import tiny_model
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from builders.trainers import causal_model, with_lora
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.models.exits import exits_in
from distill_llm.pipeline import estimating
from distill_llm.pipeline.estimate import Estimate
from distill_llm.pipeline.prices import Devices, Models, Rows, optimizer_bytes, steps_of
from distill_llm.pipeline.work import measured_rate
from distill_llm.recipe.recipe import parse_recipe

ROWS = Rows(train=100, test=10, longest=32, padded=32.0, scored=32.0)


TEACHER, STUDENT = (causal_model(layers=layers).to("meta") for layers in (2, 1))
SIZE, SMALL = (sum(each.numel() for each in model.parameters()) for model in (TEACHER, STUDENT))
TRAINING = {"losses": {"labels": {}, "logits": {}}, "per_device_train_batch_size": 4, "max_steps": 10}


def given(**changes):
    """A recipe with a given student, or with a pruning section."""
    recipe = {
        "teacher": {"model": "teacher"},
        "data": {"task": "text", "path": "text.txt"},
        "student": {"model": "student"},
        "distillation": TRAINING,
    }
    return parse_recipe({**recipe, **changes})


def made(recipe, devices=None):
    return Estimate(recipe, Models(TEACHER, STUDENT if recipe.student else None), ROWS, devices or Devices(1, 10**9))


def recovery(recipe, devices=None):
    """The stage that trains the student; nothing after it is priced."""
    return next(stage for stage in made(recipe, devices).stages() if "recover" in stage.name)


@pytest.fixture(scope="module")
def plain():
    return recovery(given())


@pytest.mark.parametrize(
    ("text", "count", "size"),
    [("8x80GB", 8, 80 * 10**9), ("80gb", 1, 80 * 10**9), ("2 x 24 GB", 2, 24 * 10**9), ("1x0.5GB", 1, 5 * 10**8)],
)
def test_devices_are_read(text, count, size):
    assert (Devices.named(text).count, Devices.named(text).size) == (count, size)


@pytest.mark.parametrize("text", ["", "8", "0x80GB", "8x80", "8x0GB", "x80GB", "8xH100"])
def test_other_devices_are_refused(text):
    with pytest.raises(InputError, match="accepted: NUMBERxMEMORY, for example 8x80GB"):
        Devices.named(text)


@pytest.mark.slow
def test_every_stage_has_its_weights_gradients_moments_and_teacher():
    found = {stage.name: stage.parts for stage in made(given(student=None, pruning={"keep": 0.5})).stages()}
    assert list(found) == ["teacher", "round-1/prune", "round-1/recover", "report"]
    assert found["teacher"]["weights"] == 4 * SIZE
    recover = found["round-1/recover"]
    student = recover["weights"] / 4
    embeddings = 2 * 100 * 32 + 32  # and the last norm: what is not in layers
    assert student - embeddings == pytest.approx(0.5 * (SIZE - embeddings), rel=0.02)
    assert recover["optimizer"] == 8 * student and recover["teacher"] == 4 * SIZE
    assert recover["gradients and batch"] > 4 * student
    assert found["round-1/prune"]["models"] == found["report"]["models"] == 4 * (SIZE + student)


@pytest.mark.slow
def test_learning_under_rounding_is_priced_as_another_recovery_by_its_own_fields():
    quantize = {"bits": 8, "train": {"max_steps": 30}}
    found = {stage.name: stage for stage in made(given(quantize=quantize)).stages()}
    before, after = found["round-1/recover"], found["quantize/train"]
    assert list(found) == ["teacher", "round-1/recover", "quantize/train", "report"] and after.parts == before.parts
    once = before.flops - made(given())._scored(STUDENT).flops
    assert after.flops - before.flops == pytest.approx(2 * once)  # 30 steps for 10
    assert "quantize/train" not in {stage.name for stage in made(given(quantize={"bits": 8})).stages()}


def test_pruning_from_main_memory_holds_a_layer_and_its_second_moments():
    pruning = {"keep": 0.5, "offload": True, "checkpointing": True, "moment_layers": 1}
    parts = next(stage for stage in made(given(student=None, pruning=pruning)).stages() if "prune" in stage.name).parts
    assert parts["models"] == 4 * SMALL  # a teacher of one layer is the student
    assert parts["second moments"] == 4 * (32**2 + 64**2)  # of what attention's and FFN's last linears read


@pytest.mark.slow
def test_fits_in_order_are_priced_with_the_streams_that_they_hold():
    def prune(compensate, gpu):
        recipe = given(student=None, pruning={"keep": 0.5, "compensate": compensate})
        every = Estimate(recipe, Models(TEACHER), ROWS, Devices(1, 10**9), gpu).stages()
        return next(stage for stage in every if "prune" in stage.name)

    there, here = (prune("in_order", gpu) for gpu in (True, False))
    assert "residual streams" not in there.parts  # they are in main memory
    assert here.parts["residual streams"] == 4 * 4 * 32 * 100 * 32, (
        "four, fp32, of 32 channels for 100 rows of 32 tokens"
    )
    forward = 100 * 32 * 2 * SIZE  # of all rows: two operations for each weight, and those of attention
    assert 10 * 0.5 * forward < there.flops - prune(True, True).flops < 10 * 1.5 * forward


@pytest.mark.slow
def test_scales_are_priced_by_their_steps():
    def prune(scales, compensate=True):
        recipe = given(student=None, pruning={"keep": 0.5, "scales": scales, "compensate": compensate})
        every = Estimate(recipe, Models(TEACHER), ROWS, Devices(1, 10**9), True).stages()
        return next(stage for stage in every if "prune" in stage.name)

    forward = 32 * 32 * 2 * SIZE  # of the 32 rows of a batch, 32 tokens each
    more = prune({"steps": 10}).flops - prune(None).flops
    assert 10 * 1.5 * forward < more < 10 * 3.5 * forward
    alone = prune({"steps": 10}, False).flops - prune(None, False).flops
    assert more < alone < more + forward, "the student is scored without scales too: 10 rows"


def test_sharing_divides_the_students_bytes_and_not_the_teachers(plain):
    ddp, fsdp = (recovery(given(), Devices(4, 10**9, sharing)).parts for sharing in ("ddp", "fsdp2"))
    one = plain.parts
    assert one["weights"] == 4 * SMALL and one["teacher"] == 4 * SIZE
    assert ddp == {**one, "buckets": 4 * SMALL}
    assert fsdp["weights"] == fsdp["gradients"] == SMALL and fsdp["optimizer"] == 2 * SMALL
    assert fsdp["teacher"] == 4 * SIZE


@pytest.mark.parametrize(
    ("changes", "per_weight"),
    [
        pytest.param({"teacher": {"model": "teacher", "dtype": "bfloat16"}}, 2, marks=pytest.mark.slow),
        ({"distillation": {**TRAINING, "bf16": True}}, 2),
        ({"teacher": {"model": "teacher", "cache": "folder"}}, 0),
    ],
)
def test_the_teacher_is_as_large_as_its_dtype(changes, per_weight):
    assert recovery(given(**changes)).parts.get("teacher", 0) == per_weight * SIZE


@pytest.mark.slow
def test_a_teacher_that_is_trained_is_priced_as_a_student():
    stage = next(made(given(teacher={"model": "t", "train": {"optim": "sgd"}})).stages())
    assert stage.name == "teacher" and stage.parts["optimizer"] == 0 and stage.parts["weights"] == 4 * SIZE


def forward(layers, rows, tokens=32, classes=100):
    """Floating point operations of a decoder of the builders: the linears, attention's two products, the head."""
    linears = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
    return 2 * rows * tokens * (layers * (linears + 2 * tokens * 32) + classes * 32)


STEPS, SCORED = 10, forward(1, 10)


@pytest.mark.slow
def test_each_generation_is_another_training_taught_by_one_of_its_own_shape(plain):
    given_three = given(distillation={**TRAINING, "generations": {"count": 3, "ensemble": True}})
    found = {stage.name: stage for stage in made(given_three).stages()}
    again = [f"round-1/{name}" for name in ("generation-2", "generation-3")]
    assert list(found) == ["teacher", "round-1/recover", *again, "round-1/generations", "report"]
    first, second, third = (found[name] for name in ("round-1/recover", *again))
    assert first == plain and second.parts == third.parts and second.flops == third.flops
    assert second.parts["weights"] == second.parts["teacher"] == 4 * SMALL and first.parts["teacher"] == 4 * SIZE
    assert first.flops - second.flops == STEPS * (forward(2, 4) - forward(1, 4))
    assert found["round-1/generations"].parts["models"] == 3 * 4 * SMALL
    assert found["round-1/generations"].flops == 3 * SCORED
    cached = given(teacher={"model": "t", "cache": "c"}, distillation={**TRAINING, "generations": 2})
    parts = {stage.name: stage.parts for stage in made(cached).stages()}
    assert "teacher" not in parts["round-1/recover"] and parts["round-1/generation-2"]["teacher"] == 4 * SMALL


@pytest.mark.slow
def test_peers_are_further_students_of_each_step_and_no_teacher():
    peers = {"model": "teacher", "peers": [{"model": "other"}]}
    recipe = given(teacher=peers)
    models = Models(TEACHER, STUDENT, peers=(TEACHER,))
    found = next(s for s in Estimate(recipe, models, ROWS, Devices(1, 10**9)).stages() if "recover" in s.name)
    assert found.parts["weights"] == 4 * (SMALL + SIZE) and found.parts["optimizer"] == 8 * (SMALL + SIZE)
    assert "teacher" not in found.parts and found.parts["gradients and batch"] > 4 * (SMALL + SIZE)
    attention = 2 * 4 * 32 * 2 * 32 * 32  # of a layer, whose probabilities the backward pass computes again
    training = STEPS * (3 * (forward(1, 4) + forward(2, 4)) + 3 * attention / 2)  # backward twice as much as forward
    assert found.flops == training + SCORED + forward(2, 10)
    with pytest.raises(InputError, match="^accelerate: got 'fsdp2'; accepted: ddp: peers learn in whole models"):
        list(Estimate(recipe, models, ROWS, Devices(2, 10**9, "fsdp2")).stages())


@pytest.mark.slow
def test_peers_that_are_cut_have_a_stage_of_their_own():
    peers = {"model": "teacher", "peers": [{"model": "other"}, {"keep": 0.25}]}
    recipe = given(student=None, pruning={"keep": 0.5}, teacher=peers)
    made = Estimate(recipe, Models(TEACHER, peers=(STUDENT, None)), ROWS, Devices(1, 10**9))
    found = {stage.name: stage.parts for stage in made.stages()}
    assert list(found) == ["teacher", "round-1/prune", "round-1/prune-peer-2", "round-1/recover", "report"]
    student, peer = (found[name]["models"] / 4 - SIZE for name in ("round-1/prune", "round-1/prune-peer-2"))
    embeddings = 2 * 100 * 32 + 32
    assert peer - embeddings == pytest.approx(0.25 * (SIZE - embeddings), rel=0.05)
    assert found["round-1/recover"]["weights"] == 4 * (student + SMALL + peer)
    assert made.trial()[0].peers == () and made.trial()[0].teacher is None


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "folder"])
def test_exits_add_their_heads_to_the_last_recovery_alone(cache):
    teacher = tiny_model(layers=3, num_labels=3).to("meta")
    recipe = {
        "teacher": {"model": "teacher", "cache": cache},
        "data": {"task": "sst2", "path": "rows"},
        "pruning": {"keep": 0.5, "rounds": 2} if cache is None else {"layers": [0, 1]},
        "distillation": TRAINING,
    }
    found, last = [], "round-2/recover" if cache is None else "round-1/recover"
    for exits in (None, {"after": [1], "threshold": 0.9}):
        stages = Estimate(parse_recipe({**recipe, "exits": exits}), Models(teacher), ROWS, Devices(1, 10**9)).stages()
        found.append({stage.name: stage for stage in stages})
    before, after = found
    assert last == "round-1/recover" or before["round-1/recover"] == after["round-1/recover"]
    parts, more = before[last].parts, after[last].parts
    heads = 32 * 32 + 32 + 32 * 3 + 3
    assert more["weights"] - parts["weights"] == 4 * heads and more["optimizer"] - parts["optimizer"] == 8 * heads
    # Of one token of each of four rows.
    assert after[last].flops - before[last].flops == STEPS * 3 * 2 * 4 * (32 * 32 + 32 * 3)


@pytest.mark.slow
def test_an_exit_of_a_language_model_runs_the_head_for_its_own_logits_and_for_the_deepest():
    student, found = causal_model(layers=3).to("meta"), []
    for exits in (None, [1, 2]):
        stages = Estimate(given(exits=exits), Models(TEACHER, student), ROWS, Devices(1, 10**9)).stages()
        found.append(next(stage for stage in stages if "recover" in stage.name))
    before, after = found
    assert before.parts["weights"] == after.parts["weights"] and not hasattr(student.config, "exits")
    # 4 rows of 32 tokens: products of each exit, its two gradients, and products of the deepest states.
    vocabulary, width = student.lm_head.weight.shape
    assert after.flops - before.flops == STEPS * 2 * (4 * 2 * 4 * 32 * vocabulary * width)
    assert after.parts["gradients and batch"] > before.parts["gradients and batch"]


def test_the_step_that_is_tried_here_is_the_one_with_exits():
    student = causal_model(layers=2).to("meta")
    seconds, rates = lambda work, device: work() or 2.0, []
    for exits in (None, [1]):
        step, shape = Estimate(given(exits=exits), Models(TEACHER, student), ROWS, Devices(1, 10**9)).trial()
        assert ("exits" in step.objective.terms(), exits_in(step.student)) == (bool(exits), bool(exits))
        rates.append(measured_rate(step, shape, torch.device("cpu"), seconds))
    # As many operations more, in these same two seconds, as in the test above.
    vocabulary, width = student.lm_head.weight.shape
    assert 2 * (rates[1] - rates[0]) == 2 * (4 * 4 * 32 * vocabulary * width) and not exits_in(student)


@pytest.mark.slow
def test_accumulated_micro_batches_hold_whole_gradients_beside_the_next_batch(plain):
    more = recovery(given(distillation={**TRAINING, "gradient_accumulation_steps": 2}))
    name = "gradients and batch"
    assert plain.parts[name] < more.parts[name] <= plain.parts[name] + 4 * SMALL
    assert 1.9 < more.flops / plain.flops < 2


@pytest.mark.slow
def test_the_states_of_a_narrower_student_are_projected_on_paper_too():
    losses = {"labels": {}, "logits": {}, "hidden": {"layers": "last"}}
    narrow = causal_model(layers=1, hidden_size=24).to("meta")
    plain = given(distillation={**TRAINING, "losses": losses})
    projected = Estimate(plain, Models(TEACHER, narrow), ROWS, Devices(1, 10**9))
    stage = next(each for each in projected.stages() if "recover" in each.name)
    assert stage.parts["weights"] == 4 * sum(each.numel() for each in narrow.parameters())
    assert stage.flops > 0


@pytest.mark.slow
def test_the_weights_below_adapters_take_as_many_bytes_as_they_are_quantized_to():
    pytest.importorskip("peft")
    student = {"model": "student", "peft": {"r": 2, "target_modules": "all-linear"}}
    found = []
    for quantization in ({}, {"quantization": "4bit"}):
        recipe = given(student={**student, **quantization})
        models = Models(TEACHER, STUDENT, lambda model: with_lora(copy.deepcopy(model)))
        stages = Estimate(recipe, models, ROWS, Devices(1, 10**9)).stages()
        found.append(next(each for each in stages if "recover" in each.name).parts["weights"])
    layers = sum(each.numel() for each in STUDENT.model.layers.parameters())
    adapters = sum(p.numel() for p in with_lora(copy.deepcopy(STUDENT)).parameters()) - SMALL
    assert found[0] - found[1] == (4 - 0.5) * (layers + adapters)


@pytest.mark.slow
def test_flops_are_those_of_all_steps_and_of_the_scored_rows(plain):
    two = recovery(given(distillation={**TRAINING, "max_steps": 20})).flops
    steps = two - plain.flops  # of ten steps
    assert 0 < plain.flops - steps < 0.2 * steps


@pytest.mark.parametrize(
    ("fields", "rows", "batch", "steps"),
    [
        ({"max_steps": 7}, 1000, 8, 7),
        ({"num_train_epochs": 2}, 1000, 8, 250),
        ({}, 1001, 8, 3 * 126),
        ({"num_train_epochs": 0.5}, 90, 8, 6),
    ],
)
def test_steps_are_those_of_the_trainer(fields, rows, batch, steps):
    assert steps_of(fields, rows, batch) == steps


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_an_optimizers_state_is_as_large_as_torchs(name, make):
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.zeros(1000)
    optimizer = make([weight])
    optimizer.step()
    held = sum(each.nbytes for each in optimizer.state.get(weight, {}).values() if each.numel() > 1)
    assert optimizer_bytes(name) == held / 1000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    write_recipe(tmp_path, recipe_for(tmp_path))
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, ["estimate", *arguments], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_the_command_shows_every_stage_at_a_measured_rate_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    result = call("recipe.yaml", "--devices", "2x0.000001GB")
    assert result.exit_code == 0, result.output
    for stage in ("teacher", "round-1/prune", "round-1/recover", "report"):
        (line,) = [line for line in result.output.splitlines() if re.match(rf"\W*{stage}\b", line)]
        assert " no " in line
    assert "TFLOP/s a device, measured on " in result.output
    assert [path for path in sorted(folder.rglob("*")) if path not in before] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--devices", "8xH100"], "--devices: got '8xH100'; accepted: NUMBERxMEMORY, for example 8x80GB"),
        (["--accelerate", "fsdp"], "--accelerate: got 'fsdp'; accepted: 'fsdp2' (the nearest), or one of ddp,"),
        (
            ["--set", "teacher.model=nowhere/at/all"],
            "teacher.model: got 'nowhere/at/all'; accepted: an existing folder",
        ),
    ],
)
def test_bad_input_is_one_line(folder, arguments, line):
    result = call("recipe.yaml", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {line}"), result.stderr


def test_what_is_auto_is_bf16_on_the_gpus_of_a_forecast():
    said = given(teacher={"model": "t", "train": {"bf16": "auto"}}, distillation={**TRAINING, "bf16": "auto"})
    resolved = estimating._fast_in_bf16(said)
    assert resolved.training("teacher")["bf16"] is True and resolved.training("final")["bf16"] is True
    assert said.teacher.train == {"bf16": "auto"}, "the recipe stays as it is"
