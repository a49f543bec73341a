"""Tasks that are not supported are named as such."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, ViTConfig

from distill_llm.common.errors import InputError
from distill_llm.data import GLUE, DataSpec
from distill_llm.data.loading import read_task
from distill_llm.models.finding import OpenModel, check_head, open_model


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ner", "token classification"),
        ("Question-Answering", "question answering"),
        ("summarization", "sequence-to-sequence"),
        ("swag", "multiple choice"),
        ("image-classification", "image classification"),
    ],
)
def test_a_task_is_named_with_those_that_are_supported(name, words):
    with pytest.raises(InputError, match=rf"data.task: got '{name}'; .*classification, .*{words}.* is not supported"):
        read_task(DataSpec(name, "rows.csv"))


@pytest.mark.parametrize(
    ("head", "words"),
    [("BertForQuestionAnswering", "question answering"), ("T5ForConditionalGeneration", "sequence-to-sequence")],
)
def test_a_model_for_such_a_task_is_named_too(head, words):
    model = OpenModel("teacher.model", "m", "m", BertConfig(architectures=[head]), SimpleNamespace())
    with pytest.raises(InputError, match=f"this one is for {words}.* not supported"):
        check_head(model, GLUE["sst2"])


def test_an_image_model_is_named_where_its_tokenizer_is_looked_for(tmp_path):
    ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="^model: got .*; this model is for image classification, which is not supp"):
        open_model("model", str(tmp_path))


def test_another_name_gets_the_nearest():
    with pytest.raises(InputError, match="'sst2' \\(the nearest\\)"):
        read_task(DataSpec("sst-2"))
