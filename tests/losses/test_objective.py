"""The objective's mapping."""

import inspect
import re
import subprocess
import sys
import warnings

import pytest
import yaml

from distill_llm.common.errors import InputError
from distill_llm.losses import parse_objective
from distill_llm.losses.distances import MAP_DISTANCES, STATE_DISTANCES
from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.terms.logits import LogitsLoss


def test_defaults_are_filled_in_and_absent_terms_stay_absent():
    objective = parse_objective({"labels": {"weight": 0.5}, "hidden": None})
    assert objective.labels.weight == 0.5
    assert (objective.hidden.layers, objective.hidden.distance) == ("lineage", "mse")
    assert list(objective.terms()) == ["labels", "hidden"]
    assert objective.needs_teacher and not parse_objective({"labels": {}}).needs_teacher


@pytest.mark.parametrize(
    "mapping, field, words",
    [
        ({"logits": {"temperature": -1}}, "losses.logits.temperature", "above 0, or a schedule"),
        ({"logits": {"temprature": 1}}, "losses.logits.temprature", "'temperature' (the nearest)"),
        ({"logit": {}}, "losses.logit", "'logits' (the nearest)"),
        ({"logits": {"divergence": "kl"}}, "losses.logits.divergence", "one of forward_kl"),
        ({"logits": {"divergence": ["jsd"]}}, "losses.logits.divergence", "one of forward_kl"),
        ({"labels": {"weight": -0.1}}, "losses.labels.weight", "at least 0"),
        ({"labels": {"weight": float("nan")}}, "losses.labels.weight", "a number of at least 0"),
        ({"hidden": {"layers": "linage"}}, "losses.hidden.layers", "lineage, uniform, last"),
        ({"hidden": {"layers": [[0]]}}, "losses.hidden.layers", "pairs"),
        ({"attention": {"layers": [[0, -1]]}}, "losses.attention.layers", "pairs"),
        ({"labels": 3}, "losses.labels", "weight"),
        ({"hidden": {"layers": []}}, "losses.hidden.layers", "pairs"),
        ({"hidden": {"layers": [[0, 1.5]]}}, "losses.hidden.layers", "whole numbers"),
        ({"hidden": {"distance": "l2"}}, "losses.hidden.distance", "mse, cosine, normalized_mse"),
        ({"relations": {"pairs": ["qk"]}}, "losses.relations.pairs.0", "qq, kk, vv"),
        ({"relations": {"pairs": []}}, "losses.relations.pairs", "list"),
        ({"relations": {"heads": 0}}, "losses.relations.heads", "at least 1"),
        ({"logits": {"top_k": 0}}, "losses.logits.top_k", "at least 1"),
        ({"logits": {"skew": 0.1}}, "losses.logits.skew", "remove it: forward_kl does not use it, only skew_kl"),
        ({"logits": {"divergence": "mse", "top_k": 3}}, "losses.logits.top_k", "remove it: mse does not use it"),
        ({"logits": {"divergence": "skew_kl", "skew": 1}}, "losses.logits.skew", "below 1"),
        ({"logits": {"divergence": "jsd", "beta": 1}}, "losses.logits.beta", "below 1 with jsd"),
        ({"labels": {"weight": True}}, "losses.labels.weight", "a number of at least 0, or a schedule"),
        ({"labels": {"weight": {"start": 0, "end": 0}}}, "losses", "above zero"),
        ({"logits": {"temperature": {"start": 4, "end": 0}}}, "losses.logits.temperature.end", "a number above 0"),
        ({"logits": {"temperature": {"start": 4}}}, "losses.logits.temperature.end", "required"),
        ({"logits": {"weight": {"start": "x", "end": 1}}}, "losses.logits.weight.start", "a number"),
        (
            {"logits": {"weight": {"start": 1, "end": 2, "shape": 1}}},
            "losses.logits.weight.shape",
            "'share' (the nearest)",
        ),
        ({"logits": {"weight": {"start": 1, "end": 2, "share": 2}}}, "losses.logits.weight.share", "at most 1"),
        ({"hidden": {"weight": {"start": 1, "end": 2, "schedule": "sine"}}}, "losses.hidden.weight.schedule", "cosine"),
        ({"labels": {"weight": {"start": 1, "end": 2, "share": 1, "steps": 2}}}, "losses.labels.weight.steps", "share"),
        ({}, "losses", "at least one"),
        ({"labels": {"weight": 0}}, "losses", "at least one"),
        ([], "losses", "mapping"),
    ],
)
def test_a_wrong_objective_is_one_line_that_names_the_field_and_what_is_accepted(mapping, field, words):
    with pytest.raises(InputError) as error:
        parse_objective(mapping)
    assert error.value.field == field
    assert words in error.value.accepted + error.value.fix
    assert "\n" not in str(error.value)


def test_an_objective_with_schedules_and_settings_survives_the_way_to_yaml_and_back():
    schedule = {"start": 4, "end": 1, "schedule": "cosine", "steps": 10}
    mapping = {
        "logits": {"divergence": "dkd", "temperature": schedule, "alpha": 0.5},
        "hidden": {"weight": {"start": 0, "end": 1}, "layers": [[0, 1]]},
    }
    objective = parse_objective(mapping)
    assert objective.logits.settings() == {"alpha": 0.5} and objective.logits.needs_labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dumped = objective.model_dump(mode="json", exclude_none=True)
    assert dumped["logits"]["temperature"] == schedule
    assert parse_objective(yaml.safe_load(yaml.safe_dump(dumped))) == objective == parse_objective(objective)


def test_every_divergence_and_distance_is_a_documented_function_whose_settings_an_objective_can_give():
    for name, (function, settings, _) in DIVERGENCES.items():
        assert re.search(r"\w, \d{4}|, section", function.__doc__), name
        assert set(settings) <= set(LogitsLoss.model_fields)
    settings = {name: row.settings for name, row in DIVERGENCES.items()}
    assert settings["jsd"] == ("beta", "top_k") and settings["mse"] == () and settings["dkd"] == ("alpha", "beta")
    assert [name for name, row in DIVERGENCES.items() if row.needs_labels] == ["dkd"]
    assert list(STATE_DISTANCES) == ["mse", "cosine", "normalized_mse"] and list(MAP_DISTANCES) == ["kl", "mse"]
    for function in (*STATE_DISTANCES.values(), *MAP_DISTANCES.values()):
        assert [*inspect.signature(function).parameters] == ["student", "teacher"] and function.__doc__


def test_an_objective_is_read_without_torch_and_every_public_name_is_there():
    code = "import sys, distill_llm.losses.objective; print('torch' in sys.modules); from distill_llm.losses import *"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
