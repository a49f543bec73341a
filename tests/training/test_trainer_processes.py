"""Two processes train as one."""

import pytest
import torch
from builders.pairs import assert_alike, assert_each_step_seen, one_and_two_processes

FEW = [("causal-lm", 16, ["all"]), ("dropout", 0, ["0.1"]), ("skips", 0, ["5"])]
MANY = [
    ("sequence-classification", 32, ["labels", "logits", "all", "gradients"]),
    ("sequence-classification", 16, ["gathered"]),
    ("masked-lm", 24, ["labels", "hidden", "all", "labels on one rank"]),
    ("causal-lm", 16, ["labels", "labels on one rank", "logits tied", "both tied strict", "both cached", "both lora"]),
    ("augmented", 0, ["0.7"]),
    ("answers", 0, ["1.0", "0.5"]),
]
MEMORIES = [("sequence-classification", 16, ["remembered", "stages strict"]), ("causal-lm", 16, ["stages strict"])]
EXITS = [("sequence-classification", 32, ["exits strict"]), ("causal-lm", 32, ["exits strict"])]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return one_and_two_processes(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return one_and_two_processes(tmp_path_factory.mktemp("many"), MANY)


@pytest.mark.parametrize("head, name", [(head, name) for head, _, names in FEW[:1] for name in names])
def test_two_processes_train_as_one_on_the_same_global_batches(few, head, name):
    assert_each_step_seen(few, head, name)


def test_each_process_has_dropout_masks_of_its_own_as_each_row_of_one_has(few):
    one, first, second = (run["dropout 0.1"][0]["kept"] for run in few)
    assert len(one) == 8 and len(first) == len(second) == 4
    rows = [row for masks in (first, second) for row in masks]
    for masks in (list(one), rows):  # the rows themselves are equal
        assert all(0.8 < row.float().mean() < 0.97 for row in masks)
        assert not any(torch.equal(a, b) for number, a in enumerate(masks) for b in masks[:number])


def test_a_step_that_one_process_must_skip_is_skipped_by_both(few):
    assert_alike(few, "skips 5")
    assert [run["skips 5"][0]["skipped"].item() for run in few] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("head, name", [(head, name) for head, _, names in MANY[:-2] for name in names])
def test_two_processes_train_as_one_with_every_head_and_setting(many, head, name):
    assert_each_step_seen(many, head, name)


@pytest.mark.slow
def test_two_processes_have_the_queues_and_centres_of_one_and_leave_out_the_same_terms(tmp_path):
    runs = one_and_two_processes(tmp_path, MEMORIES)
    for head, _, names in MEMORIES:
        for name in names:
            assert_each_step_seen(runs, head, name)
    one, two, other = (run["sequence-classification remembered"][0] for run in runs)
    assert len([name for name in one if "memory" in name]) == 5 + 5 + 2 and one["memory.contrast.count"] == 4 * 8
    assert one["memory.qud.keys"].tolist() == two["memory.qud.keys"].tolist() == other["memory.qud.keys"].tolist()


@pytest.mark.slow
def test_two_processes_teach_exits_as_one(tmp_path):
    runs = one_and_two_processes(tmp_path, EXITS)
    for head in ("sequence-classification", "causal-lm"):
        assert_each_step_seen(runs, head, "exits strict")
    assert any(name.startswith("exit_heads.0") for name in runs[0]["sequence-classification exits strict"][0])


@pytest.mark.slow
def test_two_processes_change_and_count_the_rows_that_one_does(many):
    assert_alike(many, "augmented 0.7")
    one, two, other = (run["augmented 0.7"][0]["counted"].tolist() for run in many)
    assert one == two == other and one[-1] == 32 and 10 < one[0] < 32


@pytest.mark.slow
@pytest.mark.parametrize("share", MANY[-1][2])
def test_two_processes_learn_from_their_students_answers_as_one(many, share):
    all_seen, seen, other_seen = assert_alike(many, f"answers {share}")
    assert sum(all_seen) == sum(seen) + sum(other_seen) and sum(seen) != sum(other_seen)
