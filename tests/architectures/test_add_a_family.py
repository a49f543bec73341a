"""docs/development/add-a-family.md: its row is added, and models of the family are pruned; nothing else is edited for it."""

import re
from pathlib import Path

import pytest
import torch
from builders.families import assert_equal, family_batch, outputs_of
from transformers import GemmaConfig, GemmaForCausalLM

from distill_llm import load_pretrained, masked, prune
from distill_llm.architectures.families import FAMILIES, family_of

TEXT = (Path(__file__).parents[2] / "docs" / "development" / "add-a-family.md").read_text()
ROW, USE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_row_of_the_page_prunes_a_family_that_had_none(tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    config = GemmaConfig(**sizes, intermediate_size=64, vocab_size=100, max_position_embeddings=64)
    torch.manual_seed(0)
    model = GemmaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="got family 'gemma'"):
        family_of(model)
    batch = family_batch(model)
    names = {"model": model, "batches": [batch]}
    try:
        exec(ROW, names)
        exec(USE, names)
        plan, student = names["plan"], names["student"]
        assert 0.99 * 0.6 <= plan.kept <= 0.6
        left, whole = (sum(p.numel() for p in each.model.layers.parameters()) for each in (student, model))
        assert left / whole == pytest.approx(plan.kept)
        with masked(model, plan):
            expected = outputs_of(model, batch)
        assert_equal(outputs_of(prune(model, plan), batch), expected)
        student.save_pretrained(tmp_path)
        assert_equal(outputs_of(load_pretrained(tmp_path), batch), outputs_of(student, batch))
    finally:
        FAMILIES.pop("gemma", None)
