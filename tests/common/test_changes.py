"""Settings that changed, in words."""

from distill_llm.common.changes import changed


def test_single_settings_are_named_with_both_values():
    before = {"final": {"max_steps": 20, "learning_rate": 1e-4}, "seed": 0, "hub": None}
    after = {"final": {"max_steps": 3, "learning_rate": 1e-4}, "seed": 0, "hub": {"repo_id": "me/it"}}
    assert changed(before, after) == "final.max_steps: 20 -> 3, hub: nothing -> {'repo_id': 'me/it'}"
    assert changed(before, before) == ""


def test_many_and_long_ones_stay_on_a_line():
    many = {f"name_{number}": "x" * 500 for number in range(50)}
    text = changed(many, dict.fromkeys(many, 1))
    assert text.startswith("name_0: xxxx") and text.endswith(" -> 1 and 47 more") and len(text) < 200
