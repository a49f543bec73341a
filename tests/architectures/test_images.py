"""Models of images: what the gate of all families does not try on them."""

import pytest
import torch
from builders.checkpoints import run_elsewhere, save_all
from builders.families import (
    HIDDEN,
    LAYERS,
    NEURONS,
    QUERIES,
    assert_equal,
    family_batch,
    family_model,
    outputs_of,
    uneven_plan,
    uniform_plan,
)
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.measuring.images import image_tokens
from distill_llm.measuring.profiling import profile
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.surgery import prune, stock_expressible
from distill_llm.pruning.importance import score
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings

ELSEWHERE = """
import pathlib, sys, torch
from transformers import AutoModelForImageClassification
batch, results = torch.load("batch.pt"), {}
for path in sorted(p for p in pathlib.Path.cwd().iterdir() if (p / "config.json").exists()):
    both = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    model, info = both
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        results[path.name] = model(**batch)[0]
assert "distill_llm" not in sys.modules
torch.save(results, "results.pt")
"""


@pytest.mark.slow
def test_students_reload_bit_equal_with_this_package_and_by_plain_transformers_without_it(tmp_path):
    model = family_model("vit")
    students = {"uneven": prune(model, uneven_plan(model, hidden=True))}
    students |= {units: prune(model, uniform_plan(model, units)) for units in ("neurons", "layers")}
    assert {name: stock_expressible(student) for name, student in students.items()} == {
        "uneven": False,
        "neurons": True,
        "layers": True,
    }
    expected = save_all(students, family_batch(model), tmp_path)
    found = run_elsewhere(ELSEWHERE, tmp_path)
    for name, output in expected.items():
        assert torch.equal(found[name], output), name
        again = load_pretrained(tmp_path / name)
        assert all(torch.equal(each, again.state_dict()[key]) for key, each in students[name].state_dict().items())


@pytest.mark.slow
def test_statistics_are_those_of_a_mask_of_ones_that_every_unit_is_multiplied_by():
    model, batch = family_model("vit"), family_batch(family_model("vit"))
    batch["labels"] = torch.tensor([0, 2, 1])
    found = collect_statistics(model, [batch], settings=CalibrationSettings(exact=True))
    size = HIDDEN // QUERIES
    for index, layer in enumerate(model.vit.layers):
        for kind, path, units, width in (
            ("heads", "attention.o_proj", QUERIES, size),
            ("neurons", "mlp.fc2", NEURONS, 1),
        ):
            mask = torch.ones(3, 1, units, requires_grad=True)

            def scaled(module, args, mask=mask, width=width):
                return (args[0] * mask.repeat_interleave(width, -1), *args[1:])

            # A hidden patch is read by no query, but it is one itself, and what it gives goes nowhere.
            handle = layer.get_submodule(path).register_forward_pre_hook(scaled)
            logits = model(pixel_values=batch["pixel_values"], attention_mask=batch["attention_mask"]).logits
            handle.remove()
            F.cross_entropy(logits, batch["labels"], reduction="sum").backward()
            fisher = mask.grad[:, 0].square().sum(0)
            torch.testing.assert_close(getattr(found, kind)[index].fisher, fisher, rtol=1e-3, atol=1e-6)
            model.zero_grad()


@pytest.mark.slow
def test_a_plan_meets_its_budget_and_costs_are_measured_on_images():
    model, batch = family_model("vit"), family_batch(family_model("vit"))
    statistics = collect_statistics(model, [batch], loss="kl")
    plan = plan_pruning(model, score(statistics), keep=0.5)
    student = prune(model, plan, compensate=statistics)
    assert plan.kept == pytest.approx(0.5, abs=0.02)
    measured = profile(student, 2, 8), profile(model, 2, 8)
    assert image_tokens(model) == measured[0].sequence_length == 9
    assert 0.4 < measured[0].layer_params / measured[1].layer_params < 0.6
    assert measured[0].flops < 0.7 * measured[1].flops
    linears = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * NEURONS) * 9 * 2 * 2
    attention = LAYERS * 2 * 2 * 2 * 9 * 9 * HIDDEN
    patches, head = 2 * 2 * 8 * HIDDEN * 2 * 9, 2 * 2 * HIDDEN * 3
    assert measured[1].flops == linears + attention + patches + head


@pytest.mark.slow
def test_masks_of_patches_hide_them_and_statistics_without_masks_are_refused():
    model, batch = family_model("vit"), family_batch(family_model("vit"))
    changed = batch["pixel_values"].clone()
    changed[2, :, 3:, 3:] += 5.0  # the patches behind the fifth token
    assert_equal(outputs_of(model, {**batch, "pixel_values": changed}), outputs_of(model, batch))
    del batch["attention_mask"]
    with pytest.raises(
        InputError, match=r"^dataloader: got 'batches with pixel_values'; let the collator add attention_mask"
    ):
        collect_statistics(model, [batch], loss="kl")
