"""Calibration rows of several sources: shares, draws, refusals, and statistics against rows put together by hand."""

import json
from collections import Counter

import pytest
import torch
from builders.recipes import causal_recipe, faults_at_the_door, recipe_with, write_decoder, write_model, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill_llm.checks.recipe import open_recipe
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.inputs import changes, inputs_of
from distill_llm.pipeline.stages.prune import calibration
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.recipe.calibration import counts_of


@pytest.fixture
def texts(tmp_path):
    """A decoder; training text of words 0 to 40, and two files of words in their fifties and sixties."""
    write_decoder(tmp_path / "teacher")
    lines = [{"story": f"w{50 + i % 10} w{50 + i // 10}"} for i in range(30)]
    (tmp_path / "fifties.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "sixties.txt").write_text("\n\n".join(f"w{60 + i % 10} w{60 + i // 10} w60" for i in range(30)))
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def recipe_of(folder, *sources, seed=0, examples=8, **pruning):
    pruning = {"keep": 0.5, "calibration_examples": examples, "calibration": list(sources), **pruning}
    return causal_recipe(folder, student__model=None, pruning=pruning, seed=seed, data__max_length=8)


FIFTIES = {"path": "fifties.jsonl", "columns": {"text": "story"}}


def sources(folder, *shares):
    each = [{}, FIFTIES, {"path": "sixties.txt"}]
    return [
        {**source, "share": share} | ({"path": str(folder / source["path"])} if source else {})
        for source, share in zip(each, shares, strict=True)
    ]


def origins(opened, cut=0) -> Counter:
    """By what the rows of a cut hold: the training rows have words below 50 alone."""
    tokenizer = opened.reader.tokenizer
    tens = {ten: {tokenizer.convert_tokens_to_ids(f"w{ten + i}") for i in range(10)} for ten in (50, 60)}
    rows = opened.calibration.of_cut(cut)["input_ids"]
    return Counter(next((ten for ten, ids in tens.items() if ids & set(row)), 0) for row in rows)


def test_rows_come_in_the_shares_said_and_are_drawn_with_the_seed(texts):
    opened = open_recipe(recipe_of(texts, *sources(texts, 2, 1, 1), cuts=2))
    assert origins(opened) == origins(opened, 1) == {0: 5, 50: 3, 60: 2}, "a quarter more than 8"
    rows = [opened.calibration.of_cut(cut)["input_ids"][:] for cut in (0, 1, 2)]
    assert rows[0] != rows[1] and rows[2] == rows[0], "another cut gets others while there are any"
    again = open_recipe(recipe_of(texts, *sources(texts, 2, 1, 1), cuts=2))
    assert again.calibration.of_cut(0)["input_ids"][:] == rows[0]
    other = open_recipe(recipe_of(texts, *sources(texts, 2, 1, 1), seed=1))
    assert origins(other) == origins(opened) and other.calibration.of_cut(0)["input_ids"][:] != rows[0]
    alone = open_recipe(recipe_of(texts, sources(texts, 2, 1, 1)[2]))
    assert origins(alone) == {60: 10}


@pytest.mark.parametrize(
    "shares, rows, counts", [([1, 1, 1], 10, [4, 3, 3]), ([0.5, 0.25, 0.25], 10, [5, 3, 2]), ([9, 1], 4, [4, 0])]
)
def test_shares_become_whole_rows_by_largest_remainder(shares, rows, counts):
    assert counts_of(shares, rows) == counts


def test_faults_of_sources_are_found_at_the_door_under_their_own_names(texts):
    def faults(source, **more):
        return faults_at_the_door(recipe_of(texts, {}, source, **more))

    (missing,) = faults({"path": str(texts / "none.jsonl")})
    assert missing.startswith("pruning.calibration.1.path: got '/") and "none.jsonl" in missing
    (empty,) = faults({"path": str(texts / "empty.txt")})
    assert empty.startswith("pruning.calibration.1.path: got '/") and "empty.txt" in empty
    (column,) = faults({"path": str(texts / "fifties.jsonl")})
    assert column.startswith("pruning.calibration.1.columns.text: ") and "story" in column
    (few,) = faults({"path": str(texts / "fifties.jsonl"), "columns": {"text": "story"}, "share": 3}, examples=40)
    assert few.startswith(
        "pruning.calibration.1.share: got 3.0; lower it, or pruning.calibration_examples: 37 rows are due"
    )
    assert all(len(fault) <= 300 for fault in (missing, empty, column, few))
    for share, words in ((0, "pruning.calibration.1.share: got 0"), (-1, "pruning.calibration.1.share: got -1")):
        with pytest.raises(ValueError, match=words):
            faults({"share": share})


def test_a_share_of_no_row_is_refused(texts):
    (none,) = faults_at_the_door(recipe_of(texts, {}, {**FIFTIES, "path": str(texts / "fifties.jsonl"), "share": 0.01}))
    assert (
        none.startswith("pruning.calibration.1.share: got 0.01; raise it") and "of 10 rows none is from there" in none
    )


def test_labels_of_a_source_are_the_classes_of_the_training_rows_by_name(tmp_path):
    write_model(tmp_path / "teacher", num_labels=3)
    write_rows(tmp_path / "rows.csv", ("bad", "good", "very"))

    def opened(*labels):
        source = str(write_rows(tmp_path / "other.csv", labels))
        return recipe_with(
            tmp_path, pruning={"keep": 0.5, "calibration_examples": 8, "calibration": [{"path": source}]}
        )

    recipe = opened("very", "bad", "good")
    lines = [f"{word},{word.title()}" for word in ("very", "bad", "good") * 8]  # each row says its class
    (tmp_path / "other.csv").write_text("\n".join(["review,mood", *lines]))
    found = open_recipe(recipe)
    rows, ids = found.calibration.of_cut(0), found.reader.tokenizer.convert_tokens_to_ids(["bad", "good", "very"])
    assert len(rows) == 10 and [ids.index(row[1]) for row in rows["input_ids"]] == rows["labels"][:]
    for labels in (("good", "very"), ("a", "b", "c"), ("good",)):
        (fault,) = faults_at_the_door(opened(*labels))
        given, alone = ", ".join(labels), " alone" if len(labels) == 1 else ""
        assert fault.startswith(f"pruning.calibration.0.columns.label: got '{given}{alone} in /")
        ending = "rows of each class of the training rows, and of no other: bad, good, very"
        assert fault.endswith(f"other.csv'; accepted: {ending}") and len(fault) <= 300


def test_a_run_does_not_go_on_with_other_rows_of_a_source(texts):
    recipe = recipe_of(texts, *sources(texts, 2, 1, 1))
    before = inputs_of(open_recipe(recipe))
    assert changes(before, inputs_of(open_recipe(recipe)), recipe.model_dump()) == []
    (texts / "sixties.txt").write_text("\n\n".join(f"w{61 + i % 9} w{60 + i // 10} w60" for i in range(30)))
    (fault,) = changes(before, inputs_of(open_recipe(recipe)), recipe.model_dump())
    assert fault.field == "pruning.calibration.2.path" and "sixties.txt" in str(fault)
    assert str(fault).endswith("its rows changed since this run began")


def test_statistics_are_those_of_the_rows_put_together_by_hand(tmp_path):
    write_model(tmp_path / "teacher", num_labels=2)
    said = {"mine": ["good film", "bad plot"], "other": ["very good", "not the film"]}
    for name, words in said.items():
        (tmp_path / name).mkdir()
        for split, count in (("train", 5), ("test", 2)):
            lines = [f"{words[i % 2]} {' '.join(['the'] * i)},{('neg', 'pos')[i % 2]}" for i in range(count)]
            (tmp_path / name / f"{split}.csv").write_text("\n".join(["review,mood", *lines]) + "\n")
    listed = [{}, {"path": str(tmp_path / "other")}]
    pruning = {"keep": 0.5, "calibration_examples": 8, "calibration": listed}
    run = Context(open_recipe(recipe_with(tmp_path, data__path=str(tmp_path / "mine"), pruning=pruning)))
    batches = list(calibration(run, 8))
    assert sum(len(batch["input_ids"]) for batch in batches) == 10
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    rows = [f"{words[i % 2]} {' '.join(['the'] * i)}" for words in said.values() for i in range(5)]
    by_hand = {**tokenizer(rows, padding=True, return_tensors="pt"), "labels": torch.tensor([0, 1, 0, 1, 0] * 2)}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher").eval()
    settings = CalibrationSettings(exact=True)
    found, expected = (collect_statistics(model, given, settings=settings) for given in (batches, [by_hand]))
    assert (found.examples, found.tokens) == (expected.examples, expected.tokens)
    for mine, its in zip((*found.heads, *found.neurons), (*expected.heads, *expected.neurons), strict=True):
        torch.testing.assert_close(mine.fisher, its.fisher, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(mine.activation, its.activation, rtol=1e-3, atol=1e-9)
