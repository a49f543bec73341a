"""Students with low-rank adapters, and quantised models on either side."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import (
    TERMS,
    assert_same_step,
    both_ways,
    causal_model,
    model_of,
    pruned_student,
    rows,
    step_gradient,
    trainer_of,
    with_lora,
)

from distill_llm.common.errors import InputError
from distill_llm.models.adapters import merged, without_adapters
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.teachers import OnlineTeacher, load_teacher

BOTH = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5, "temperature": 2.0}}


def stacked(data):
    return {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("head", ["masked-lm", "causal-lm"])
def test_an_adapted_student_has_the_gradients_of_whole_logits_and_in_its_adapters_only(tmp_path, monkeypatch, head):
    teacher, student = model_of(head, layers=4), with_lora(model_of(head, layers=2, seed=1))
    found = both_ways(monkeypatch, tmp_path, student, teacher, rows(teacher), TERMS["all"])
    assert_same_step(found)
    assert len(found[0][0]) == 8 and all("lora_" in name for name in found[0][0])


def test_the_terms_of_an_adapted_student_are_those_of_the_merged_one(tmp_path):
    teacher, student = causal_model(layers=4), with_lora(causal_model(layers=2, seed=1))
    data = rows(teacher)
    logs = [step_gradient(tmp_path, each, teacher, data, TERMS["all"])[1] for each in (student, merged(student))]
    for name in (name for name in logs[0] if name.startswith("loss")):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


def test_adapters_learn_beside_projections_of_another_width(tmp_path):
    teacher, student = causal_model(layers=4), with_lora(causal_model(layers=2, seed=1, hidden_size=24))
    found, _ = step_gradient(tmp_path, student, teacher, rows(teacher), {"hidden": {"layers": "last"}})
    projections = [name for name in found if name.startswith("projection")]
    assert projections and len(found) > len(projections)
    assert all(found[name].abs().sum() > 0 for name in found if "lora_A" in name or name in projections)


def test_training_moves_adapters_only_and_a_resumed_one_ends_with_the_same(tmp_path):
    teacher, student = causal_model(), with_lora(causal_model(layers=2, seed=1))
    before, data, ends = copy.deepcopy(student.state_dict()), rows(teacher, count=12), []
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = copy.deepcopy(student)
        trainer_of(tmp_path, model, teacher, data, BOTH, **settings).train(resume_from_checkpoint=resume)
        ends.append(model.state_dict())
    assert {name for name in before if not torch.equal(before[name], ends[0][name])} == {
        name for name in before if "lora_" in name
    }
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert {path.name for path in (tmp_path / "checkpoint-2").glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "causal-lm"])
def test_a_merged_model_has_the_logits_of_the_adapted_one_and_stock_keys(tmp_path, head):
    model = model_of(head, layers=2)
    keys, batch = set(model.state_dict()), stacked(rows(model))
    adapted = with_lora(model, task_type="SEQ_CLS" if head == "sequence-classification" else None)
    logits = adapted(**batch).logits
    plain = merged(adapted)
    torch.testing.assert_close(plain(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert set(plain.state_dict()) == keys and type(plain) is type(without_adapters(adapted))
    assert torch.equal(adapted(**batch).logits, logits) and merged(plain) is plain
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(load_pretrained(tmp_path).eval()(**batch).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_pruned_student_learns_in_adapters_and_is_saved_merged_and_reloaded(tmp_path):
    teacher = tiny_model(layers=4)
    student = with_lora(pruned_student(teacher), modules_to_save=["classifier"])
    data = rows(teacher)
    losses = {"labels": {}, "logits": {}, "hidden": {"layers": "lineage"}, "attention": {"layers": "lineage"}}
    trainer = trainer_of(tmp_path / "run", student, teacher, data, losses, max_steps=3)
    trainer.train()
    assert [log["loss/attention"] > 0 for log in trainer.state.log_history if "loss" in log] == [True] * 3
    student.eval()
    merged(student).save_pretrained(tmp_path / "student")
    again = load_pretrained(tmp_path / "student").eval()
    batch = stacked(data)
    torch.testing.assert_close(again(**batch).logits, student(**batch).logits, rtol=1e-4, atol=1e-5)
    assert type(again).__name__.startswith("Pruned") and not any("lora" in key for key in again.state_dict())


def test_an_adapter_on_the_output_map_leaves_the_logits_to_the_model(tmp_path):
    teacher, plain = causal_model(), causal_model(layers=2, seed=1)
    data = rows(teacher)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    found, log = step_gradient(tmp_path, adapted, teacher, data, BOTH)
    assert len(found) == 2 and log["loss"] == pytest.approx(
        step_gradient(tmp_path, plain, teacher, data, BOTH)[1]["loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    "head, modules", [("causal-lm", ["embed_tokens", "lm_head"]), ("masked-lm", ["word_embeddings"])]
)
def test_adapters_are_refused_where_merging_them_would_change_another_module_too(tmp_path, head, modules):
    peft, tied = pytest.importorskip("peft"), {"tie_word_embeddings": True}
    for module in modules:
        model = model_of(head, layers=2, **tied)
        before, batch = copy.deepcopy(model), stacked(rows(model))
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[module]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        adapted.eval()
        assert not torch.allclose(merged(adapted)(**batch).logits, adapted(**batch).logits, atol=0.1), "now it is right"
        with pytest.raises(InputError, match=f"model: got '{module}'; .*modules_to_save") as error:
            trainer_of(tmp_path, adapted, None, [], {"labels": {}})
        assert "\n" not in str(error.value)
        saved = peft.get_peft_model(before, peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=[module]))
        trainer_of(tmp_path, saved, None, rows(model), {"labels": {}}, max_steps=2).train()
        torch.testing.assert_close(merged(saved.eval())(**batch).logits, saved(**batch).logits, rtol=1e-4, atol=1e-5)


def test_adapters_that_lengthen_the_input_are_refused_in_one_line(tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="model: got 'PromptTuningConfig'; accepted: LoRA") as error:
        trainer_of(tmp_path, peft.get_peft_model(causal_model(), settings), None, [], {"labels": {}})
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    model = causal_model(hidden_size=64, head_dim=16, intermediate_size=128)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("quantization, close", [("8bit", 0.05), ("4bit", 0.5)])
def test_a_quantised_teacher_is_near_its_original_and_is_neither_moved_nor_cast(saved, quantization, close):
    folder, model = saved
    teacher = load_teacher(folder, quantization, torch.float32)
    before = {name: (parameter.dtype, parameter.device) for name, parameter in teacher.named_parameters()}
    online = OnlineTeacher(teacher)
    online.place(torch.device("cpu"), torch.bfloat16)
    assert online.model is teacher and online.head is not None
    assert before == {name: (parameter.dtype, parameter.device) for name, parameter in teacher.named_parameters()}
    assert teacher.model.layers[0].mlp.up_proj.weight.element_size() == 1
    batch = stacked(rows(model))
    expected = model(**batch).logits
    error = (online.signals(batch).logits - expected).norm() / expected.norm()
    assert 0 < error < close


def test_a_student_learns_from_a_quantised_teacher_what_its_own_forward_says(tmp_path, monkeypatch, saved):
    teacher, student = load_teacher(saved[0], "4bit", torch.float32), causal_model(layers=2, seed=1)
    assert_same_step(both_ways(monkeypatch, tmp_path, student, teacher, rows(student), BOTH))


@pytest.mark.parametrize("quantization, close", [("8bit", 0.05), ("4bit", 0.02)])
def test_a_quantised_student_learns_in_adapters_only_and_is_merged_in_floating_point(
    tmp_path, saved, quantization, close
):
    folder, teacher = saved
    student, data = load_teacher(folder, quantization, torch.float32), rows(teacher)
    with pytest.raises(InputError, match="model: got 'a quantised LlamaForCausalLM'; accepted: a PeftModel") as error:
        trainer_of(tmp_path, student, teacher, data, BOTH)
    assert "\n" not in str(error.value)
    adapted = with_lora(student)
    trainer = trainer_of(tmp_path, adapted, teacher, data, BOTH, max_steps=2, learning_rate=1e-3)
    before = trainer.state.global_step, copy.deepcopy(adapted.state_dict())
    trainer.train()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[1][name])}
    assert changed and all("lora_" in name for name in changed)
    plain, batch = merged(adapted.eval()), stacked(data)
    assert set(plain.state_dict()) == set(teacher.state_dict())
    own, expected = plain(**batch).logits, adapted(**batch).logits
    assert (own - expected).norm() / expected.norm() < close
    plain.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_pretrained(tmp_path / "merged").eval()(**batch).logits, own)


def test_an_unknown_quantization_and_a_missing_library_are_refused_in_one_line(saved, monkeypatch):
    with pytest.raises(InputError, match="quantization: got '3bit'; accepted: .*8bit.*4bit") as error:
        load_teacher(saved[0], "3bit")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("distill_llm.models.quantized.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantization: got '4bit'; .*pip install bitsandbytes") as error:
        load_teacher(saved[0], "4bit")
    assert "\n" not in str(error.value)


def test_a_teacher_without_quantization_is_the_saved_model_in_evaluation_mode(saved):
    teacher = load_teacher(saved[0])
    assert not teacher.training and teacher.dtype == torch.float32
    assert all(torch.equal(tensor, saved[1].state_dict()[name]) for name, tensor in teacher.state_dict().items())
