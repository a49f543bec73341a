"""Checkpoints: reloaded in other processes, with and without this package, and refused where a weight is not as it was saved."""

import json
from pathlib import Path

import pytest
import torch
from builders.causal import causal_model
from builders.checkpoints import (
    HEADS_OF,
    WITH_PACKAGE,
    WITHOUT_PACKAGE,
    plan_of,
    run_elsewhere,
    save_all,
    spoil,
    stock_student,
    student_of,
)
from builders.grids import slow
from builders.models import FAMILIES, random_batch, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForPreTraining, PreTrainedModel

from distill_llm.architectures.lineage import lineage_of
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.surgery import prune


@pytest.mark.parametrize("code", [WITHOUT_PACKAGE, *slow(WITH_PACKAGE)], ids=["trust_remote_code", "load_pretrained"])
def test_a_fresh_process_reloads_students_bit_equal(tmp_path, code):
    models = {family: student_of(family, head) for family, head in HEADS_OF.items()}
    models["bert-token"] = student_of("bert", "token-classification", num_labels=5)
    models["distilbert-mlm"] = student_of("distilbert", "masked-lm")
    models["bert-mlm"] = student_of("bert", "masked-lm")
    models |= {f"stock-{k}-{f}": stock_student(k, f) for k in ("layers", "neurons") for f in ("bert", "distilbert")}
    twice = student_of()
    models["twice"] = prune(twice, plan_of(twice, [(0, (1,), range(9)), (2, (0, 3), ())]))
    expected = save_all(models, random_batch(tiny_model(), labels=False), tmp_path)
    found = run_elsewhere(code, tmp_path)
    assert found.keys() == expected.keys()
    for name, output in expected.items():
        assert torch.equal(found[name], output), name
    if code is WITHOUT_PACKAGE:
        for name, output in expected.items():  # what was saved again, where the package is not installed
            again = load_pretrained(tmp_path / f"{name}-again")
            with torch.no_grad():
                assert torch.equal(again(**torch.load(tmp_path / "batch.pt"))[0], output), name
            assert lineage_of(again) == lineage_of(models[name])


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("kind", ["layers", "neurons"])
def test_what_a_stock_config_can_say_is_saved_without_any_code(tmp_path, kind, family):
    student = stock_student(kind, family)
    student.save_pretrained(tmp_path)
    check_stock(tmp_path, student)


def test_a_student_that_became_stock_expressible_has_no_trace_of_the_code_in_its_config(tmp_path):
    model = tiny_model(layers=4)
    uneven = prune(model, plan_of(model, [(i, range(4), range(30 + i)) for i in range(4)]))
    uneven.save_pretrained(tmp_path / "uneven")
    even = prune(uneven, plan_of(uneven, [(i, range(4), range(20)) for i in range(4)]))
    even.save_pretrained(tmp_path / "even")
    check_stock(tmp_path / "even", even)


def check_stock(folder: Path, student: PreTrainedModel) -> None:
    """The folder holds nothing but what plain transformers needs, and loads there bit-equal."""
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"] == [type(student).__name__]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(student)
    batch = random_batch(student)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, student(**batch).logits)


def test_a_checkpoint_loaded_with_remote_code_can_be_pruned_and_saved(tmp_path):
    student_of().save_pretrained(tmp_path / "first")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first", trust_remote_code=True)
    smaller = prune(loaded, plan_of(loaded, [(0, (1,), range(9)), (2, (0, 3), ())]))
    assert type(smaller).__name__ == "PrunedBertForSequenceClassification"
    smaller.save_pretrained(tmp_path / "second")
    batch = random_batch(loaded)
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "second")(**batch).logits, smaller(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["uneven", "fewer heads", "no attention"])
def test_without_trust_a_pruned_checkpoint_raises_and_does_not_load_half(tmp_path, family, rows):
    model = tiny_model(family, layers=2)
    plans = {
        "uneven": [(0, (1, 3), range(5, 40)), (1, (), range(3))],
        "fewer heads": [(0, (0, 1), range(64)), (1, (0, 1), range(64))],
        "no attention": [(0, (), range(64)), (1, range(4), range(64))],
    }
    prune(model, plan_of(model, plans[rows])).save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_bert_with_fewer_heads_keeps_its_head_size_and_is_never_saved_as_stock(tmp_path):
    model = tiny_model(
        layers=2
    )  # 4 heads of 8 channels; 2 heads divide the hidden size and would silently become 16 wide
    student = prune(model, plan_of(model, [(i, (0, 3), range(64)) for i in range(2)]))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["PrunedBertForSequenceClassification"]
    assert (
        config["auto_map"]["AutoModelForSequenceClassification"]
        == "modeling_pruned.PrunedBertForSequenceClassification"
    )
    assert (config["num_attention_heads"], config["head_dim"]) == (2, 8)
    assert config["num_hidden_layers"] == 2
    attention = load_pretrained(tmp_path).bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size, attention.query.out_features) == (2, 8, 16)


def test_lineage_and_sizes_are_in_the_config_and_weights_only_in_safetensors(tmp_path):
    student = student_of()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pruning"]["layers"][0] == {"source": 0, "heads": "1,3", "neurons": "5-39"}
    assert config["num_hidden_layers"] == 3
    found = sorted(p.name for p in tmp_path.iterdir())
    code = ["configuration_pruned.py", "families.py", "family.py", "lineage.py", "modeling_pruned.py", "prototypes.py"]
    assert found == sorted(["config.json", "model.safetensors", *code])
    assert lineage_of(load_pretrained(tmp_path)) == lineage_of(student)


def test_a_tokenizer_beside_the_weights_is_found(tmp_path, minilm):
    student_of().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    tokens = AutoTokenizer.from_pretrained(tmp_path)("a small model")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(minilm)("a small model")["input_ids"]
    load_pretrained(tmp_path)


def test_saving_into_the_folder_it_was_loaded_from_works(tmp_path):
    student_of().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_checkpoints_unless_given(tmp_path, dtype):
    student_of().to(dtype).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).dtype == dtype
    assert load_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("how", ["missing", "unexpected", "mismatched"])
@pytest.mark.parametrize(
    "made", [student_of, lambda: stock_student("layers"), tiny_model], ids=["pruned", "stock", "dense"]
)
def test_a_checkpoint_with_a_wrong_tensor_is_refused_in_one_line(tmp_path, made, how):
    made().save_pretrained(tmp_path)
    spoil(tmp_path, how, "bert.encoder.layer.1.output.dense.weight")
    words = {
        "missing": "missing keys: bert.encoder.layer.1.output.dense.weight",
        "unexpected": "unexpected keys: bert.encoder.layer.1.output.dense.weight_extra",
        "mismatched": "weights of the sizes in its config.json",
    }
    with pytest.raises(InputError, match=words[how]) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_stock_checkpoint_may_hold_heads_that_its_class_has_not_but_no_layers(tmp_path):
    """Those of bert-base on the Hub name BertForMaskedLM and hold the pooler and the head of BertForPreTraining too."""
    torch.manual_seed(0)
    whole = BertForPreTraining(tiny_model().config)
    whole.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(tmp_path)
    batch = random_batch(loaded)
    del batch["labels"]
    expected = whole.eval()(**batch).prediction_logits
    assert torch.equal(loaded.eval()(**batch).logits, expected)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(InputError, match=r"unexpected keys: bert\.encoder\.layer"):
        load_pretrained(tmp_path)


def test_a_stock_checkpoint_may_hold_what_older_layers_kept_beside_their_weights(tmp_path):
    """GPT-2's masks and Llama's frequencies; a bias or a norm that the model has no place for is not such."""
    for family, layer, old, other in (
        ("gpt2", "transformer.h.1.attn.", ("bias", "masked_bias"), ("q_norm.weight", "c_attn.scale")),
        ("llama", "model.layers.1.self_attn.", ("rotary_emb.inv_freq",), ("q_proj.bias", "q_norm.weight")),
    ):
        model = causal_model(family)
        model.save_pretrained(tmp_path / family)
        file = tmp_path / family / "model.safetensors"
        weights = load_file(file)
        save_file(weights | {layer + name: torch.ones(3) for name in old}, file, metadata={"format": "pt"})
        loaded = load_pretrained(tmp_path / family)
        assert all(torch.equal(one, loaded.get_parameter(name)) for name, one in model.named_parameters())
        for name in other:
            save_file(weights | {layer + name: torch.ones(3)}, file, metadata={"format": "pt"})
            with pytest.raises(InputError, match=f"unexpected keys: {layer}{name}"):
                load_pretrained(tmp_path / family)


def test_a_checkpoint_that_names_no_known_class_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architectures in ([], ["BertForEverything"]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(InputError, match="model: got"):
            load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["empty", "list", "cut", "bytes", "gone"])
def test_a_damaged_or_missing_file_is_one_line(tmp_path, name, how):
    save = tiny_model()
    save.save_pretrained(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "list": b"[]", "cut": content[: len(content) // 2]}.get(how, b"\xff\xfe" * 50))
    if how == "gone":
        file.unlink()
    with pytest.raises(InputError) as caught:
        load_pretrained(tmp_path)
    assert str(caught.value).startswith(f"model: got {str(tmp_path)!r}; accepted: ") and "\n" not in str(caught.value)
