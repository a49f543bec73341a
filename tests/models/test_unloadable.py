"""Folders that transformers cannot make a model of: one line that names the model, and no code of weights runs."""

import json
import pickle
from pathlib import Path

import pytest
from builders.recipes import write_model
from transformers import ASTConfig, ASTModel, T5Config, T5ForConditionalGeneration

from distill_llm import load_pretrained, profile
from distill_llm.checks.models import skeleton
from distill_llm.common.errors import InputError
from distill_llm.models.finding import open_model


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "zero"),
        ({"hidden_act": "foo"}, "foo"),
        ({"hidden_size": -4}, "negative"),
    ],
)
def test_a_config_that_no_model_can_have_is_one_line(tmp_path, setting, reason):
    config = write_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | setting))
    opened = open_model("teacher.model", str(tmp_path), tokenizer=False)
    for field, load in (("teacher.model", lambda: skeleton(opened)), ("model", lambda: load_pretrained(tmp_path))):
        with pytest.raises(InputError, match=reason) as error:
            load()
        assert str(error.value).startswith(f"{field}: got ") and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("classes", [3, "BertModel", [3]])
def test_classes_that_are_no_list_of_names_are_refused_at_the_door(tmp_path, classes):
    config = write_model(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": classes}))
    with pytest.raises(InputError, match="a list of names under `architectures`"):
        open_model("model", str(tmp_path))


@pytest.mark.parametrize("kind", ["empty", "text", "code"])
def test_weights_that_cannot_be_read_are_one_line_and_run_nothing(tmp_path, kind):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {"empty": b"", "text": b"no weights", "code": pickle.dumps(Runs(tmp_path / "ran"))}[kind]
    (tmp_path / "pytorch_model.bin").write_bytes(weights)
    with pytest.raises(InputError, match="nothing but tensors, undamaged"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_encoder_and_decoder_is_profiled_and_one_of_sound_refused():
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    assert profile(t5, 2, 4, repeats=1).params == sum(each.numel() for each in t5.parameters())
    sound = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(InputError, match="reads input_values"):
        profile(ASTModel(ASTConfig(**sound, max_length=32, num_mel_bins=16)), 2, 4, repeats=1)
