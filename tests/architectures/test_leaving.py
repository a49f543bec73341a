"""Classifiers with exits: rows leave a batch as each would alone; the last head is that of the plain model; folders keep them."""

import copy

import pytest
import torch
from builders.checkpoints import WITHOUT_PACKAGE, run_elsewhere, save_all, student_of
from builders.models import random_batch, tiny_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distill_llm import InputError, keep_layers, load_pretrained, prune, with_exits
from distill_llm.architectures.modeling_exits import EXIT_FAMILIES
from distill_llm.models.exits import without_exits

KINDS = [*EXIT_FAMILIES, "pruned"]


def plain(kind="bert", **sizes):
    """A classifier of 3 classes; `pruned`: one of three layers without some attention, FFN, heads and neurons."""
    return student_of(num_labels=3, **sizes) if kind == "pruned" else tiny_model(kind, layers=4, num_labels=3, **sizes)


def exiting(model, after=(1, 2), seed=0):
    found = with_exits(model, after)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.exit_heads.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return found


def median_confidence(model, batch):
    """A threshold that half of the confidences are above, and none is at."""
    with torch.no_grad():
        found = model(**batch, output_exits=True).exit_logits.softmax(-1).amax(-1).flatten().sort().values
    return found[len(found) // 2 - 1 : len(found) // 2 + 1].mean().item()  # between two rows, whose rounding may differ


@pytest.mark.grid(1)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_row_gives_alone_at_its_exit_in_the_order_of_the_rows(kind, kernel):
    model = exiting(plain(kind, attn_implementation=kernel) if kind != "pruned" else plain(kind))
    batch = random_batch(model, batch=12, length=14, labels=False)
    threshold, counts = median_confidence(model, batch), []
    with torch.no_grad():
        together = model(**batch, exit_threshold=threshold)
        for row in range(12):
            length = int(batch["attention_mask"][row].sum())
            alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
            every = model(**alone, output_exits=True)
            heads = torch.cat([every.exit_logits[0], every.logits])
            sure = [*(heads[:2].softmax(-1).amax(-1) > threshold).tolist(), True]
            place = sure.index(True)
            counts.append([1, 2, model.config.num_hidden_layers][place])
            torch.testing.assert_close(together.logits[row], heads[place], rtol=1e-4, atol=1e-5)
            left = model(**alone, exit_threshold=threshold)
            assert left.layers_run.tolist() == [counts[-1]]
    assert together.layers_run.tolist() == counts
    assert len(set(counts)) == 3  # rows left at both exits, and some went on


def test_rows_that_left_are_in_no_later_layer():
    model = exiting(plain())
    batch, seen = random_batch(model, batch=8, labels=False), []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    threshold = median_confidence(model, batch)
    seen.clear()
    with torch.no_grad():
        counts = model(**batch, exit_threshold=threshold).layers_run
    assert seen == [8, int((counts > 1).sum()), int((counts > 2).sum()), int((counts > 3).sum())] and seen[3] < 8
    seen.clear()
    with torch.no_grad():
        assert model(**batch, exit_threshold=0.0).layers_run.tolist() == [1] * 8
    assert seen == [8]  # nothing runs for nobody


@pytest.mark.parametrize("kind", ["bert", "pruned"])
def test_the_last_head_gives_the_bits_of_the_model_without_exits_and_a_threshold_is_off_until_it_is_set(kind):
    model = plain(kind)
    batch = random_batch(model, batch=6)
    found = exiting(model)
    with torch.no_grad():
        expected = model(**batch)
        for given in ({}, {"output_exits": True}, {"exit_threshold": 1.0}):
            outputs = found(**batch, **given)
            assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
        assert found(**batch).keys() == expected.keys()
        found.exit_threshold = 0.0
        early = found(**batch)
        assert early.layers_run.tolist() == [1] * 6
        torch.testing.assert_close(early.loss, torch.nn.functional.cross_entropy(early.logits, batch["labels"]))
        assert torch.equal(found(**batch, exit_threshold=1.0).logits, expected.logits)
        by_place = found(batch["input_ids"], batch["attention_mask"], exit_threshold=1.0, return_dict=False)
        assert isinstance(by_place, tuple) and torch.equal(by_place[0], expected.logits)
    found.train()
    assert found(**batch).exit_logits.shape == (6, 2, 3)  # in training the threshold is off
    with pytest.raises(ValueError, match="exit_threshold: got 0.5 with training mode"):
        found(**batch, exit_threshold=0.5)
    with pytest.raises(ValueError, match="exit_threshold: got 0.5 with output_hidden_states"):
        found.eval()(**batch, exit_threshold=0.5, output_hidden_states=True)
    with pytest.raises(ValueError, match="exit_threshold: got 0.5 with output_exits"):
        found(**batch, exit_threshold=0.5, output_exits=True)


@pytest.mark.slow
def test_folders_load_bit_equal_here_and_by_plain_transformers_where_this_package_is_not_installed(tmp_path):
    models = {kind: exiting(plain(kind)) for kind in KINDS}
    batch = random_batch(models["bert"], labels=False)
    expected = save_all(models, batch, tmp_path)
    elsewhere = run_elsewhere(WITHOUT_PACKAGE, tmp_path)
    for kind, model in models.items():
        loaded = load_pretrained(tmp_path / kind)
        assert type(loaded) is type(model) and loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(elsewhere[kind], expected[kind])
        remote = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind, trust_remote_code=True)
        threshold = median_confidence(model, batch)
        with torch.no_grad():
            own, theirs = (each(**batch, exit_threshold=threshold) for each in (model, remote))
        torch.testing.assert_close(own.logits, theirs.logits, rtol=1e-6, atol=1e-6)  # the weights are equal bit for bit
        assert torch.equal(own.layers_run, theirs.layers_run)
        remote.save_pretrained(tmp_path / "again" / kind)
        assert type(load_pretrained(tmp_path / "again" / kind)) is type(model)
    with torch.no_grad():  # without the code it is the plain model
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", trust_remote_code=False)
        assert type(stock) is BertForSequenceClassification
        assert torch.equal(stock(**batch).logits, expected["bert"])
    (tmp_path / "bert" / "modeling_exits.py").write_text("changed")
    with pytest.raises(InputError, match="its modeling_exits.py is not that of the installed distill_llm"):
        load_pretrained(tmp_path / "bert")


def test_what_has_no_exits_is_refused_in_one_line_and_exits_are_not_pruned():
    cases = [
        (tiny_model("bert", "masked-lm", layers=4), [1], "exits: got 'BertForMaskedLM'"),
        (tiny_model("mpnet", layers=4), [1], "exits: got 'MPNetForSequenceClassification'"),
        (tiny_model(layers=4, num_labels=1), [1], r"exits: got 'a head with 1 output\(s\)'"),
        (tiny_model(layers=4), [4], r"exits.after: got \[4\]; accepted: numbers of layers from 1 to 3"),
        (tiny_model(layers=4), [2, 1], r"exits.after: got \[2, 1\]"),
        (tiny_model(layers=4), [], r"exits.after: got \[\]"),
    ]
    for model, after, message in cases:
        with pytest.raises(InputError, match=f"^{message}") as error:
            with_exits(model, after)
        assert len(str(error.value)) <= 300
    model = exiting(plain())
    with pytest.raises(InputError, match="^model: got 'ExitBertForSequenceClassification'; accepted: a model without"):
        with_exits(model, [1])
    with pytest.raises(InputError, match="^model: got 'ExitBertForSequenceClassification with exits'; prune the model"):
        prune(model, keep_layers(plain(), [0, 1]))


def test_a_config_without_exits_is_that_of_the_plain_model(tmp_path):
    exiting(plain()).save_pretrained(tmp_path)
    config = copy.deepcopy(load_pretrained(tmp_path).config)
    without_exits(config)
    assert config.architectures == ["BertForSequenceClassification"] and "auto_map" not in config.to_dict()
    assert not hasattr(BertConfig.from_dict(config.to_dict()), "exits")
