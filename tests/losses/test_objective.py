"""The objective's mapping."""

import subprocess
import sys

import pytest

from distill_llm.errors import InputError
from distill_llm.losses import parse_objective


def test_defaults_are_filled_in_and_absent_terms_stay_absent():
    objective = parse_objective({"labels": {"weight": 0.5}, "hidden": None})
    assert objective.labels.weight == 0.5
    assert (objective.hidden.layers, objective.hidden.distance) == ("lineage", "mse")
    assert list(objective.terms()) == ["labels", "hidden"]
    assert objective.needs_teacher and not parse_objective({"labels": {}}).needs_teacher


@pytest.mark.parametrize(
    "mapping, field, words",
    [
        ({"logits": {"temperature": -1}}, "losses.logits.temperature", "greater than 0"),
        ({"logits": {"temprature": 1}}, "losses.logits.temprature", "'temperature' (the nearest)"),
        ({"logit": {}}, "losses.logit", "'logits' (the nearest)"),
        ({"logits": {"divergence": "kl"}}, "losses.logits.divergence", "'forward_kl'"),
        ({"labels": {"weight": -0.1}}, "losses.labels.weight", "greater than or equal to 0"),
        ({"labels": {"weight": float("nan")}}, "losses.labels.weight", "finite"),
        ({"hidden": {"layers": "linage"}}, "losses.hidden.layers", "lineage, uniform, last"),
        ({"hidden": {"layers": [[0]]}}, "losses.hidden.layers", "pairs"),
        ({"attention": {"layers": [[0, -1]]}}, "losses.attention.layers", "pairs"),
        ({"labels": 3}, "losses.labels", ""),
        ({}, "losses", "at least one"),
        ({"labels": {"weight": 0}}, "losses", "at least one"),
        ([], "losses", "mapping"),
    ],
)
def test_a_wrong_objective_is_one_line_that_names_the_field_and_what_is_accepted(mapping, field, words):
    with pytest.raises(InputError) as error:
        parse_objective(mapping)
    assert error.value.field == field
    assert words in error.value.accepted
    assert "\n" not in str(error.value)


def test_an_objective_is_read_without_torch_and_every_public_name_is_there():
    code = "import sys, distill_llm.losses.objective; print('torch' in sys.modules); from distill_llm.losses import *"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
