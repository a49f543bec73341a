"""`export:` in a recipe: checked at the door, written after the report, written anew for another format."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from builders.exports import byte_tokenizer
from builders.recipes import faults_at_the_door, recipe_with, write_decoder, write_model, write_rows

from distill_llm import run
from distill_llm.recipe.recipe import Recipe


def recipe(folder: Path, **changes: Any) -> Recipe:
    write_decoder(folder / "teacher", tokenizer=byte_tokenizer(), vocab_size=340)
    (folder / "text.txt").write_text(
        "\n\n".join(f"The cat sat on {i} mats, and the dog on {i + 1}." for i in range(60))
    )
    data = {"task": "text", "path": str(folder / "text.txt"), "max_length": 16}
    return recipe_with(folder, data=data, distillation=None, pruning__calibration_examples=4, **changes)


def test_a_run_leaves_a_file_and_another_format_is_written_without_new_work(tmp_path: Path) -> None:
    run(recipe(tmp_path, export=[{"format": "gguf"}]), tmp_path / "out")
    first = tmp_path / "out" / "export" / "model-f16.gguf"
    assert gguf.GGUFReader(first).fields["general.architecture"].contents() in ("llama", "deci")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    run(recipe(tmp_path, export=[{"format": "gguf", "quantize": "f32"}]), tmp_path / "out")
    assert not first.exists() and (tmp_path / "out" / "export" / "model-f32.gguf").is_file()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "export" in json.loads((tmp_path / "out" / "state.json").read_text())["stages"]


@pytest.mark.parametrize(
    ("export", "line"),
    [
        ([{"format": "gguf"}], "export.0: got 'BertForSequenceClassification (bert)'"),
        ([{"format": "onnx"}, {"format": "onnx", "quantize": "f32"}], "export.1: got 'onnx, f32'; remove it"),
        ([{"format": "onnx", "quantize": "q8_0"}], "export.0.quantize: got 'q8_0'"),
        ([{"format": "tflite"}], "export.0.format: got 'tflite'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(export: list, line: str, tmp_path: Path) -> None:
    write_model(tmp_path / "teacher", id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    write_rows(tmp_path / "rows.csv")
    faults = faults_at_the_door(recipe_with(tmp_path, export=export))
    assert [fault.startswith(line) for fault in faults] == [True], faults
