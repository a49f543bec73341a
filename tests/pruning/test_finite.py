"""Numbers that are not finite end pruning in one line, before a plan or a file is made of them."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.trainers import causal_model

from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite, first_unsound, unsound_weight
from distill_llm.pruning.criteria import CRITERIA
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import Importance, score
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.record import Statistics


@pytest.fixture(scope="module")
def found():
    model = tiny_model(layers=3)
    return model, collect_statistics(model, [random_batch(model)])


def spoilt(statistics, kind, layer, name, value):
    rows = list(statistics.units[kind]) if isinstance(statistics.units[kind], tuple) else [statistics.units[kind]]
    bad = getattr(rows[layer], name).clone()
    bad[-1] = value
    rows[layer] = replace(rows[layer], **{name: bad})
    its = tuple(rows) if isinstance(statistics.units[kind], tuple) else rows[0]
    return replace(statistics, units={**statistics.units, kind: its})


def one_line(error, words):
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, layer, name, value, words",
    [
        ("heads", 1, "fisher", math.nan, "statistics: fisher of heads is nan in layer 1; calibrate"),
        ("neurons", 2, "wanda", math.inf, "statistics: wanda of neurons is inf in layer 2"),
        ("layers", 0, "activation", -math.inf, "statistics: activation of layers is -inf in layer 2"),
        ("hidden", 0, "taylor", math.nan, "statistics: taylor of hidden is nan;"),
    ],
)
def test_statistics_are_neither_written_nor_read_with_a_number_that_is_not_finite(
    found, tmp_path, kind, layer, name, value, words
):
    bad, file = spoilt(found[1], kind, layer, name, value), tmp_path / "s.safetensors"
    found[1].save(file)
    whole = file.read_bytes()
    with pytest.raises(NotFinite) as error:
        bad.save(file)
    one_line(error, words)
    assert file.read_bytes() == whole and [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Statistics, "check", lambda self: self)
        bad.save(file)
    with pytest.raises(NotFinite) as error:
        Statistics.load(file)
    one_line(error, words)


def test_moments_are_looked_at_too(found):
    rows = [list(pair) for pair in found[1].moments]
    rows[1][0] = rows[1][0]._replace(second=rows[1][0].second * math.nan)
    with pytest.raises(NotFinite, match="is nan in layer 1"):
        replace(found[1], moments=tuple(map(tuple, rows))).check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_criterion_makes_a_plan_of_such_scores(found, value):
    model, statistics = found
    statistics = replace(statistics, has_weight_gradients=True, has_refit=True)
    fields = {"flap": "fluctuation", "gisp": "weight_taylor", "obs": "refit", "fisher_obs": "refit"}
    for name in CRITERIA:
        if name in ("leave_one_out", "block_influence", "random"):
            continue
        bad = spoilt(statistics, "neurons", 2, fields.get(name, name), value)
        with pytest.raises(InputError):
            score(bad, name)
    scores = score(statistics)
    neurons = [row.clone() for row in scores.neurons]
    neurons[2][5] = value
    bad = Importance("fisher", units={**scores.units, "neurons": tuple(neurons)})
    with pytest.raises(NotFinite) as error:
        plan_pruning(model, bad, 0.5)
    one_line(error, f"a score of neurons is {value} in layer 2; score statistics")


def test_a_plan_whose_share_is_no_number_is_refused(tmp_path):
    model = tiny_model()
    full_plan(model).save(tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**record, "kept": math.nan}))
    with pytest.raises(InputError, match="plan.kept: got nan"):
        prune(model, PruningPlan.load(tmp_path / "plan.json"))


@pytest.mark.parametrize("loss", ["labels", "kl", None])
def test_a_model_that_overflows_in_its_activations_ends_the_pass(loss):
    model = tiny_model(layers=2)
    batch = random_batch(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight.fill_(3e38)
    words = "^statistics: (the loss of batch 1|.* in layer [01])" if loss else "^statistics: .* in layer [01]"
    with pytest.raises(NotFinite, match=words):
        collect_statistics(model, [batch], loss)
    with pytest.raises(NotFinite, match="^statistics: without is nan in layer 0"):
        leave_one_out(model, [batch], collect_statistics(copy.deepcopy(tiny_model(layers=2)), [batch]))


def test_a_teacher_that_gives_nan_ends_the_pass_at_its_first_batch():
    model, teacher = tiny_model(), tiny_model(seed=1)
    teacher.classifier.bias.data[0] = math.nan
    batches = iter([random_batch(model), pytest.fail])
    with pytest.raises(NotFinite, match="^statistics: the loss of batch 1 is nan"):
        collect_statistics(model, batches, "kl", teacher)


def test_rows_of_unused_tokens_with_nan_are_refused_before_the_pass_and_by_the_cut():
    model = causal_model(layers=2)
    whole = full_plan(model)
    model.model.embed_tokens.weight.data[99] = math.nan
    with pytest.raises(NotFinite, match=r"^a weight is nan in model\.embed_tokens\.weight; .*set to 0"):
        collect_statistics(model, iter([pytest.fail]))
    with pytest.raises(NotFinite, match=r"^a weight is nan in model\.embed_tokens\.weight"):
        prune(model, whole)


def test_what_is_looked_at_is_every_float_on_any_device_but_masks_in_biases():
    tensors = {
        "ids": torch.tensor([1]),
        "empty": torch.empty(0),
        "meta": torch.empty(3, device="meta"),
        "bf16": torch.tensor([3e38], dtype=torch.bfloat16),
        "fp16": torch.tensor([65504.0, -65504.0], dtype=torch.float16),
        "scalar": torch.tensor(0.0),
    }
    assert first_unsound(tensors) is None
    assert first_unsound({**tensors, "a": torch.tensor([[1.0, -math.inf]]), "b": torch.tensor(math.nan)}) == (
        "a",
        "-inf",
    )
    assert first_unsound({"half": torch.tensor([1.0, math.nan], dtype=torch.float16)}) == ("half", "nan")
    masked = torch.tensor([1.0, -math.inf])
    assert unsound_weight({"classifier.bias": masked}) is None
    assert unsound_weight({"classifier.weight": masked}) == ("classifier.weight", "-inf")
    assert unsound_weight({"classifier.bias": torch.tensor([math.nan, -math.inf])}) == ("classifier.bias", "nan")
