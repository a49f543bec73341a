"""Tiny models, rows and a recipe in the working directory, made with nothing but what distill_llm installs."""

from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "not", "the"]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def main() -> None:
    """Write `encoder/`, `decoder/`, `rows.csv` and `recipe.yaml`."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **SIZES)).save_pretrained("encoder")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained("encoder")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained("decoder")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained("decoder")
    rows = "".join(f"the film {('good', 'bad')[i % 2]},{('pos', 'neg')[i % 2]}\n" for i in range(40))
    Path("rows.csv").write_text("text,label\n" + rows)
    recipe = {
        "output_dir": "run",
        "teacher": {"model": "encoder", "train": {"max_steps": 2}},
        "data": {"task": "classification", "path": "rows.csv", "max_length": 16},
        "pruning": {"keep": 0.5, "calibration_examples": 8},
        "distillation": {"losses": {"labels": {}, "logits": {}}, "max_steps": 2},
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))


if __name__ == "__main__":
    main()
