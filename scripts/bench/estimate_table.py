"""The table of docs/guide/memory.md: what `distill-llm estimate` says of Llamas of 1B, 8B and 70B, cut to half and distilled.

Usage: estimate_table.py [NAME:SHARING ...]   (default: ROWS_SHOWN); prints a row of Markdown for each.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from distill_llm.pipeline.estimate import Estimate
from distill_llm.pipeline.prices import Devices, Models, Rows
from distill_llm.recipe.recipe import parse_recipe

TOKENS, ROWS, COUNT, SIZE, TFLOPS = 4096, 24_000, 8, 80e9, 400  # about 100 million tokens
MODELS = {  # width, neurons, layers, heads, KV groups, tied embeddings
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14336, 32, 32, 8, False),
    "70B": (8192, 28672, 80, 64, 8, False),
}
ROWS_SHOWN = ("1B:ddp", "8B:ddp", "8B:fsdp2", "70B:fsdp2")
RECIPE = {
    "teacher": {"model": "llama"},
    "data": {"task": "text", "path": "text", "max_length": TOKENS},
    "pruning": {
        "keep": 0.5,
        "calibration_examples": 128,
        "precision": "bfloat16",
        "checkpointing": True,
        "moment_layers": 4,
        "offload": True,
    },
    "distillation": {
        "losses": {"logits": {}},
        "bf16": True,
        "activation_checkpointing": True,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
    },
    "evaluation": {"batch_size": 1, "latency": {"batch_size": 1, "sequence_length": 2048}},
}


def skeleton(name):
    width, neurons, layers, heads, groups, tied = MODELS[name]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128 if width > 2048 else 64,
        tie_word_embeddings=tied,
        max_position_embeddings=2 * TOKENS,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def row_of(name, sharing):
    rows = Rows(ROWS, 250, TOKENS, TOKENS, TOKENS)
    made = Estimate(parse_recipe(RECIPE), Models(skeleton(name)), rows, Devices(COUNT, int(SIZE), sharing))
    stages = {stage.name.rpartition("/")[2]: stage for stage in made.stages()}
    cells = [f"{stages[stage].bytes / 1e9:,.0f}" for stage in ("teacher", "prune", "recover", "report")]
    parts = ", ".join(f"{part} {size / 1e9:,.0f}" for part, size in stages["recover"].parts.items())
    hours = [f"{stages[stage].flops / TFLOPS / 1e12 / 3600:.1f}" for stage in ("prune", "recover")]
    print("|", " | ".join([name, f"`{sharing}`", *cells, parts, *hours]), "|", flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or ROWS_SHOWN:
        row_of(*each.split(":"))
