"""config.json of uneven decoders says each layer's sizes as transformers does, and is read without a warning."""

import json
import logging

from builders.exports import llama_kind, uneven
from transformers import AutoConfig

from distill_llm.models.configs import open_config

BY_LAYER = {
    "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48},
    "1": {"intermediate_size": 32, "skip": ["attention"]},
    "2": {"skip": ["mlp"]},
    "3": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 56},
}


def test_each_layer_is_said_in_the_file_and_in_memory_and_sizes_for_all_are_read_quietly(tmp_path, caplog):
    uneven(llama_kind()).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["per_layer_config"] == BY_LAYER and said["allow_global_per_layer_attribute_access"] is True
    logging.getLogger("transformers").propagate = True
    try:
        for config in (AutoConfig.from_pretrained(tmp_path, trust_remote_code=True), open_config(tmp_path)):
            found = [
                (c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) for c in config.per_layer_config
            ]
            assert found == [(2, 1, 48), (4, 2, 32), (4, 2, 64), (2, 1, 56)]
            assert [each.skip for each in config.per_layer_config] == [[], ["attention"], ["mlp"], []]
            assert config.is_heterogeneous and config.num_attention_heads == 4
    finally:
        logging.getLogger("transformers").propagate = False
    assert "per-layer attribute" not in caplog.text
