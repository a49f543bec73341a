"""The cells of a sweep: their recipes and names, what they share, and the faults of any of them."""

from pathlib import Path

import pytest

from distill_llm.common.errors import InputError, faults_in
from distill_llm.recipe.cells import cells_of, first_of, teacher_key
from distill_llm.recipe.yaml_input import several

RECIPE = {
    "teacher": {"model": "me/teacher", "train": {"learning_rate": 1e-4}},
    "data": {"task": "sst2"},
    "pruning": {"keep": 0.5},
    "distillation": {},
}


def cells(over, **changes):
    return cells_of(first_of({**RECIPE, **changes}, over), over, Path("out"))


def test_every_combination_is_a_run_in_a_folder_named_by_its_values():
    found = cells({"pruning.keep": [0.7, 0.5], "pruning.units": [["heads"], ["heads", "neurons"]]})
    assert [dict(cell.values) for cell in found] == [
        {"pruning.keep": keep, "pruning.units": units}
        for keep in (0.7, 0.5)
        for units in (["heads"], ["heads", "neurons"])
    ]
    assert [(cell.recipe.pruning.keep, cell.recipe.pruning.units) for cell in found] == [
        (cell.values["pruning.keep"], cell.values["pruning.units"]) for cell in found
    ]
    assert all(cell.recipe.output_dir == Path("out") / cell.name for cell in found)
    assert len({cell.name for cell in found}) == 4 and found[0].name.startswith("keep-0.7_units-heads")
    (rate,) = cells({"distillation.learning_rate": [3e-5]})
    assert rate.name == "learning_rate-3e-05" and rate.recipe.training("final")["learning_rate"] == 3e-5


def test_names_differ_where_values_do_and_are_names_of_folders():
    odd = ["a/b", "a-b", "../up", "x" * 300, "x" * 299 + "y", " a-b"]
    names = [cell.name for cell in cells({"description": odd})]
    assert len(set(names)) == len(odd) and all("/" not in name and len(name) < 80 for name in names)
    both = cells({"teacher.train.learning_rate": [1e-5], "distillation.learning_rate": [1e-4]})[0].name
    assert both == "teacher.train.learning_rate-1e-05_distillation.learning_rate-0.0001"


def test_cells_share_a_teacher_and_statistics_unless_a_value_decides_them():
    def shared(**over):
        found = cells({name.replace("__", "."): values for name, values in over.items()})
        return [
            len(set(each))
            for each in zip(*((teacher_key(c.recipe), c.recipe.pruning.statistics) for c in found), strict=True)
        ]

    assert shared(pruning__keep=[0.7, 0.5], pruning__criterion=["fisher", "taylor"]) == [1, 1]
    assert shared(distillation__learning_rate=[1e-4, 1e-5], teacher__dtype=["float32", "bfloat16"]) == [1, 1]
    assert shared(pruning__calibration_examples=[8, 16]) == [1, 2]
    assert shared(seed=[0, 1]) == shared(data__max_length=[64, 128]) == [2, 2]
    assert shared(teacher__train__learning_rate=[1e-4, 1e-5]) == [2, 2]
    own = cells({"pruning.keep": [0.5]}, pruning={"statistics": "mine.safetensors"})[0].recipe
    assert own.pruning.statistics == Path("mine.safetensors")
    layers = cells({"pruning.layers": [[0, 1], [0, 2]]}, pruning={"layers": [0]})
    assert [cell.recipe.pruning.statistics for cell in layers] == [None, None]


def test_a_fault_of_any_cell_is_told_once():
    with pytest.raises(InputError) as error:
        cells({"pruning.keep": [0.5, 1.5], "pruning.criterion": ["fisher", "tailor"], "seed": [0, 1]})
    lines = [str(fault) for fault in faults_in(error.value)]
    assert [line.split(":")[0] for line in lines] == ["pruning.criterion", "pruning.keep"] and "taylor" in lines[0]
    for over, field in (
        ({}, "keep"),
        ({"pruning.keep": []}, "pruning.keep"),
        ({"pruning.keep": [0.5, 0.5]}, "pruning.keep"),
        ({"output_dir": ["a"]}, "over"),
        ({"pruning.keep.more": [1]}, "over"),
        ({"pruning.kep": [0.5]}, "pruning.kep"),
    ):
        with pytest.raises(InputError) as error:
            cells(over)
        assert error.value.field == field, over


def test_values_of_an_option_are_yaml_separated_by_commas():
    assert several("pruning.criterion=fisher,taylor") == ("pruning.criterion", ["fisher", "taylor"])
    assert several("pruning.units=[heads],[heads, neurons]") == ("pruning.units", [["heads"], ["heads", "neurons"]])
    assert several("teacher.quantization=null,4bit")[1] == [None, "4bit"]
    assert several("distillation.learning_rate=1e-4")[1] == [1e-4]
    for text in ("pruning.keep", "pruning.keep=", "=1", "a..b=1", "a=[1"):
        with pytest.raises(InputError, match="--over"):
            several(text)
