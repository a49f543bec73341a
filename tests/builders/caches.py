"""A tiny causal language model, token sequences of uneven length and a cache of them, for the tests of caches."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.teachers.online import OnlineTeacher

VOCABULARY = 97
SHARD_ITEMS = 40


def causal_model(seed=0, vocabulary=VOCABULARY, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model.eval()


def sequences(count=20, seed=0, labels=False) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    columns = {"input_ids": ids}
    if labels:
        columns["labels"] = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return Dataset.from_dict(columns)


def pad(rows, left=False, width=0):
    """A batch of rows, padded with token 0."""
    width = max(width, *(len(row["input_ids"]) for row in rows))

    def padded(values, value):
        fill = [value] * (width - len(values))
        return [*fill, *values] if left else [*values, *fill]

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([padded(row["labels"], -100) for row in rows])
    return batch


def write(path, model, data, teacher=None, **options):
    """A cache with small shards; `options` are those of CacheSettings, CacheSource and Writing."""
    names = CacheSettings.__dataclass_fields__
    settings = CacheSettings(**{"k": 5, **{name: options.pop(name) for name in list(options) if name in names}})
    source = {"collator": pad, "identity": model, "tokenizer": None}
    source |= {name: options.pop(name) for name in source if name in options}
    fixed = {"batch_size": 4, "shard_items": SHARD_ITEMS, "progress": False}
    source = CacheSource(teacher or OnlineTeacher(model), data, **source)
    write_cache(path, source, settings, Writing(**{**fixed, **options}))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
