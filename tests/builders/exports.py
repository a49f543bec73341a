"""Tokenizers over bytes, tiny models of the Llama kind with uneven students, and llama.cpp where it is installed."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill_llm import prune
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.pruning.plan import PruningPlan

LLAMA_CPP = Path(__file__).parents[2] / "scripts" / "llama_cpp"
HEAD, VOCABULARY = 32, 352
TEXTS = [
    "The cat sat on 1234567 mats, didn't it?  Two spaces;\ttab\n\nand lines.",
    "Größe, naïve, 東京, 🙂👍 and C'EST.",
    "a  b   c    12 345 6,789.00 <s>",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


def byte_tokenizer(rule: str = "gpt-2") -> PreTrainedTokenizerFast:
    """BPE over bytes with merges learnt from a few texts, cutting words as llama.cpp's `rule` does."""
    steps = {
        "gpt-2": pre_tokenizers.ByteLevel(False),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
        "llama-bpe": _split(LLAMA3),
        "qwen2": _split(QWEN2),
    }
    backend = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = steps[rule], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f"{text} {text.lower()}" for text in TEXTS * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: pieces of words with a mark for spaces, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for text in TEXTS[0::2] for letter in text.replace(" ", "▁") if letter > " "})
    pairs = [("▁", "t"), ("h", "e"), ("▁", "a"), ("a", "t"), ("▁t", "he"), ("c", "at"), ("▁", "cat"), ("1", "2")]
    pieces += letters + [letter for letter in "the" if letter not in letters]
    pieces += [left + right for left, right in pairs]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs, byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_kind(family: str = "llama", **config: Any) -> PreTrainedModel:
    """Four random layers: 4 query heads in 2 groups, 64 neurons."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": VOCABULARY, "head_dim": HEAD, "max_position_embeddings": 128}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "sliding_window": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **config})).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that are not all the same
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        else:
            torch.nn.init.normal_(
                parameter, 0.0, 1.6 * model.config.hidden_size**-0.5 if len(parameter) == VOCABULARY else 0.12
            )
    return model


def uneven(model: PreTrainedModel, empty: bool = True) -> PreTrainedModel:
    """Other heads and neurons in each layer; where `empty`, a layer without heads and one without neurons."""
    rows = [
        LayerPlan(0, (0,), range(48)),
        LayerPlan(1, () if empty else (1,), range(32)),
        LayerPlan(2, (0, 1), () if empty else range(16)),
        LayerPlan(3, (1,), range(8, 64)),
    ]
    return prune(model, PruningPlan(model.config.model_type, rows))


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A student's folder, with its tokenizer."""
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


needs_llama_cpp = pytest.mark.skipif(
    not (LLAMA_CPP / "node_modules").is_dir() or shutil.which("node") is None,
    reason="llama.cpp is not installed: see scripts/llama_cpp/README.md",
)


def ask_llama_cpp(file: Path, *requests: dict[str, Any]) -> list[Any]:
    """llama.cpp's answers to requests (see scripts/llama_cpp/answer.mjs)."""
    asked = json.dumps({"model": str(file), "requests": requests})
    command = ["node", str(LLAMA_CPP / "answer.mjs")]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
