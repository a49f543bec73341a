"""Weights rounded to 8 and 4 bits: which ones, and that a head of a few classes works."""

import pytest
import torch
from builders.models import tiny_model
from torch import nn

from distill_llm.models.quantized import load_teacher


@pytest.mark.grid(1)
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama"])
def test_the_base_model_is_rounded_and_the_head_is_not(tmp_path, name, bits):
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    model = tiny_model(name, hidden=64, intermediate=128)
    model.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path, bits, torch.float32)
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    base = {path for path in linear if path.startswith(f"{model.base_model_prefix}.")}
    plain = {path for path in linear if type(loaded.get_submodule(path)) is nn.Linear}
    assert base and plain == linear - base
    assert loaded(input_ids=torch.arange(2, 10)[None]).logits.isfinite().all()
