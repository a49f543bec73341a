"""Heads for tasks: fresh ones over the weights below, the checkpoint's own where it fits."""

import pytest
import torch
from builders.causal import causal_model
from builders.checkpoints import spoil, student_of
from builders.models import random_batch, tiny_model
from transformers import AutoConfig, BertConfig

from distill_llm.architectures.lineage import lineage_of
from distill_llm.common.errors import InputError
from distill_llm.data.glue import GLUE
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.kinds.classification import classification
from distill_llm.data.kinds.prompts import prompts
from distill_llm.models.checkpoint import load_for_task, load_pretrained, name_unnamed
from distill_llm.models.configs import open_config


@pytest.mark.parametrize("made", [tiny_model, student_of], ids=["dense", "pruned"])
@pytest.mark.parametrize(
    ("head", "num_labels", "task"),
    [
        ("base", 2, "sst2"),  # no head
        ("masked-lm", 2, "sst2"),  # the head of another task
        ("sequence-classification", 5, "sst2"),  # a head of another size
        ("sequence-classification", 2, "mnli"),
        ("sequence-classification", 2, "stsb"),
    ],
)
def test_a_model_gets_a_fresh_head_for_a_task_over_the_weights_it_had(tmp_path, made, head, num_labels, task):
    model = made(head=head, num_labels=num_labels)
    model.save_pretrained(tmp_path)
    loaded = load_for_task(tmp_path, GLUE[task])
    assert loaded.classifier.out_features == loaded.config.num_labels == GLUE[task].num_labels
    own = loaded.base_model.state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(own[name], tensor), name
    assert lineage_of(loaded) == lineage_of(model)
    assert torch.isfinite(loaded(**random_batch(loaded)).loss)
    loaded.save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").config.id2label == loaded.config.id2label


def test_a_head_that_fits_the_task_is_kept(tmp_path):
    model = student_of()
    model.save_pretrained(tmp_path)
    loaded = load_for_task(tmp_path, GLUE["sst2"])
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert tuple(loaded.config.id2label.values()) == GLUE["sst2"].label_names


@pytest.mark.parametrize(
    ("names", "of_task", "kept", "then"),
    [
        (("NEGATIVE", "Positive"), False, True, ("negative", "positive")),
        (("LABEL_0", "LABEL_1"), False, True, ("negative", "positive")),
        (("positive", "negative"), False, False, ("negative", "positive")),  # trained so, it would say the opposite
        (("entailment", "not_entailment"), False, False, ("negative", "positive")),
        (("bad", "good"), True, True, ("bad", "good")),
    ],
)
def test_a_head_for_other_classes_makes_way_for_a_fresh_one_with_the_tasks_names(tmp_path, names, of_task, kept, then):
    model = tiny_model(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    model.save_pretrained(tmp_path)
    loaded = load_for_task(tmp_path, GLUE["sst2"], of_task=of_task)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight) is kept
    assert tuple(loaded.config.id2label.values()) == then


@pytest.mark.parametrize("how", ["missing", "mismatched"])
@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_head_is_not_put_on_a_checkpoint_without_all_weights_below_it(tmp_path, how, num_labels):
    student_of(num_labels=num_labels).save_pretrained(tmp_path)
    spoil(tmp_path, how, "bert.encoder.layer.1.output.dense.weight")
    words = {"missing": "bert.encoder.layer.1.output.dense.weight is missing", "mismatched": "weights of the sizes in"}
    with pytest.raises(InputError, match=words[how]) as caught:
        load_for_task(tmp_path, GLUE["sst2"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [causal_lm("text", "text"), prompts()], ids=lambda task: task.kind.name)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_lm_keeps_its_head_and_is_loaded_in_fp32(tmp_path, family, task):
    model = causal_model(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_for_task(tmp_path, task)
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name


def test_a_causal_lm_without_its_head_or_of_a_family_without_one_is_refused(tmp_path):
    causal_model().base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"all weights \(lm_head.weight is missing\)"):
        load_for_task(tmp_path / "base", prompts())
    tied = causal_model(tie_word_embeddings=True)
    tied.base_model.save_pretrained(tmp_path / "tied")
    loaded = load_for_task(tmp_path / "tied", prompts())
    assert torch.equal(loaded.lm_head.weight, tied.model.embed_tokens.weight)
    student_of(head="base").save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError):
        load_for_task(tmp_path / "bert", prompts())


@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_config_that_was_opened_is_used_and_stays_as_it_is(tmp_path, monkeypatch, num_labels):
    student_of(num_labels=num_labels).save_pretrained(tmp_path)
    config = open_config(tmp_path)
    config.hidden_dropout_prob = 0.25
    before = config.to_dict()
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)
    loaded = load_for_task(tmp_path, GLUE["sst2"], config=config)
    assert loaded.config.hidden_dropout_prob == 0.25 and loaded.config.num_labels == 2
    assert config.to_dict() == before and before != loaded.config.to_dict()


@pytest.mark.parametrize(
    ("own", "words", "wanted"),
    [
        (None, ("no", "yes"), ("no", "yes")),
        (("Nein", "Ja"), ("no", "yes"), ("Nein", "Ja")),
        (None, ("0", "1"), ("LABEL_0", "LABEL_1")),
        (None, ("a", "b", "c"), ("LABEL_0", "LABEL_1")),
    ],
    ids=["no names", "names", "numbers", "another count"],
)
def test_classes_without_names_get_the_words_of_the_task(own, words, wanted):
    config = BertConfig(**({} if own is None else {"id2label": dict(enumerate(own))}))
    name_unnamed(config, classification("own", ("text",), words))
    assert tuple(config.id2label[i] for i in range(2)) == wanted
    assert own or config.label2id == {name: i for i, name in enumerate(wanted)}
