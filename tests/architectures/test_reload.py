"""Checkpoints of every family: reloaded bit-equal with this package, and by plain transformers where it is not installed."""

from dataclasses import replace

import pytest
import torch
from builders.checkpoints import WITHOUT_PACKAGE, run_elsewhere, save_all
from builders.families import EVERY, QUERIES, family_batch, family_model, outputs_of, uneven_plan, uniform_plan
from transformers import BitsAndBytesConfig

from distill_llm.architectures.lineage import lineage_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.surgery import prune, stock_expressible
from distill_llm.pruning.plan import PruningPlan, full_plan

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


@pytest.mark.slow
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name, head", [("llama", "causal-lm"), ("gpt2", "causal-lm"), ("bert", "masked-lm")])
def test_students_without_some_attentions_and_ffns_can_be_quantized(tmp_path, name, head, bits):
    """What has no entry left cannot be, and stays as it is; the rest is rounded, and outputs with it."""
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    model = family_model(name, head, hidden_size=64, num_key_value_heads=QUERIES)  # widths that it has kernels for
    rows = list(full_plan(model).layers)
    rows[1], rows[3] = replace(rows[1], heads=()), replace(rows[3], neurons=())
    student = prune(model, PruningPlan(name, tuple(rows)))
    student.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loaded = load_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"} and "EmptyLinear" in kinds
    batch = family_batch(model)
    expected, found = outputs_of(student, batch), outputs_of(loaded, batch).float()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > (0.5 if bits == 4 else 0.9)
