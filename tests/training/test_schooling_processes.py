"""Two processes train as one where the teacher is the student's average, or where students learn together."""

import pytest
from builders.pairs import assert_each_step_seen, one_and_two_processes

CASES = [
    ("sequence-classification", 32, ["both peers", "both averaged"]),
    ("causal-lm", 16, ["both peers", "both averaged", "both lora averaged"]),
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return one_and_two_processes(tmp_path_factory.mktemp("schooling"), CASES)


@pytest.mark.parametrize("head, name", [(head, name) for head, _, names in CASES for name in names])
def test_two_processes_train_as_one(runs, head, name):
    assert_each_step_seen(runs, head, name)
    learned = runs[0][f"{head} {name}"][0]
    peers = [key for key in learned if key.startswith("peer.")]
    assert bool(peers) == ("peers" in name)
