"""The door of `export`: what is refused in one line, before anything is written."""

from pathlib import Path

import pytest
from builders.exports import llama_kind, save

from distill_llm.common.errors import InputError
from distill_llm.export import export


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "ggml"}, "format: got 'ggml'; accepted: one of gguf, onnx"),
        ({"format": "gguf", "quantize": "q4"}, "quantize: got 'q4'; accepted: .*f16, bf16, f32, q8_0"),
        ({"format": "onnx", "quantize": "f16"}, "quantize: got 'f16'; accepted: .*f32, int8"),
    ],
)
def test_unknown_names_are_refused(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    save(llama_kind(), tmp_path)
    with pytest.raises(InputError, match=message):
        export(tmp_path, **arguments)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_dir.*a folder with a config.json"):
        export(tmp_path, "gguf")


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    save(llama_kind(), tmp_path / "student")
    export(tmp_path / "student", "gguf", tmp_path / "mine.gguf")
    with pytest.raises(InputError, match="output: got .*mine.gguf.*; name another file, or remove this one"):
        export(tmp_path / "student", "gguf", tmp_path / "mine.gguf")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(llama_kind(), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'distill_llm\[gguf\]'"):
        export(tmp_path, "gguf")
