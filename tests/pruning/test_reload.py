"""Checkpoints of every family: reloaded bit-equal with this package, and by plain transformers where it is not installed."""

import pytest
import torch
from checkpoint_examples import WITHOUT_PACKAGE, run_elsewhere, save_all
from family_examples import EVERY, family_batch, family_model, uneven_plan, uniform_plan

from distill_llm.checkpoint import load_pretrained
from distill_llm.pruning.families import lineage_of
from distill_llm.pruning.surgery import prune, stock_expressible

TIED = {
    "llama-tied": "causal-lm",
    "gpt2": "causal-lm",
    "gemma3_text": "causal-lm",
    "bloom": "causal-lm",
    "opt": "causal-lm",
    "bert": "masked-lm",
    "roberta": "masked-lm",
    "modernbert": "masked-lm",
    "electra": "masked-lm",
}


@pytest.fixture(scope="module")
def students():
    """A narrower student of every family, tied ones, and others that stock configs can say."""
    found = {}
    for name in EVERY:
        model = family_model(name)
        found[name] = prune(model, uneven_plan(model, hidden=True, queries=True))
    for name, head in TIED.items():
        model = family_model(name, head)
        found[f"tied-{name}"] = prune(model, uneven_plan(model, hidden=True))
    for name, units in {"llama": "hidden", "qwen3": "heads", "gemma2": "queries", "bert": "neurons"}.items():
        model = family_model(name)
        found[f"stock-{name}"] = prune(model, uniform_plan(model, units))
    return found


@pytest.fixture(scope="module")
def saved(students, tmp_path_factory):
    """Their folder, and what they give there."""
    folder = tmp_path_factory.mktemp("students")
    return folder, save_all(students, family_batch(students["bert"]), folder)


def test_plain_transformers_reloads_every_family_bit_equal_where_this_package_is_not_installed(students, saved):
    folder, expected = saved
    found = run_elsewhere(WITHOUT_PACKAGE, folder)
    assert found.keys() == expected.keys() == students.keys()
    for name, output in expected.items():
        assert torch.equal(found[name], output), name


@pytest.mark.parametrize("name", EVERY)
def test_load_pretrained_gives_the_same_model(students, saved, name):
    loaded, student = load_pretrained(saved[0] / name), students[name]
    assert type(loaded) is type(student) and not stock_expressible(student)
    assert lineage_of(loaded) == lineage_of(student)
    own = student.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(own[key], value) for key, value in loaded.state_dict().items())
    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in student.named_parameters()
    ]


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_stay_tied_after_cutting_the_width_and_after_reload(students, saved, name):
    for model in (students[f"tied-{name}"], load_pretrained(saved[0] / f"tied-{name}")):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
