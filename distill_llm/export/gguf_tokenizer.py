"""A tokenizer as GGUF's metadata says it: tokens and their types, merges, and the rule that cuts texts into words."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError

# Types of tokens.
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What llama.cpp calls the rules: by the expressions of the tokenizer's pre-tokenizer, and whether whole words win over merges.
_RULES = {
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
    ((_CONTRACTIONS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_CONTRACTIONS + r"\p{N}{1,3}" + _REST,), False): "dbrx",
    ((_CONTRACTIONS + r"\p{N}" + _REST,), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's words.

    Attributes:
        model: "gpt2" (BPE over bytes) or "llama" (SentencePiece).
        rule: llama.cpp's name of the pre-tokenizer; SentencePiece has "default".
        tokens, types: one entry per row of the embedding.
        merges: of BPE over bytes.
        scores: of SentencePiece: the higher, the earlier two parts are joined to this token.
        space_prefix: whether a text gets a space before it.
    """

    model: str
    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """A tokenizer for a model with `size` rows in its embedding.

    Raises:
        InputError: llama.cpp has no such tokenizer, or the embedding is too small for it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("tokenizer", type(tokenizer).__name__, "a tokenizer with a tokenizer.json, for GGUF")
    saved = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = saved["model"]
    if model["type"] != "BPE":
        raise InputError("tokenizer", f"of type {model['type']}", "a BPE tokenizer, for GGUF")
    if len(tokenizer) > size:
        raise InputError("tokenizer", f"{len(tokenizer)} tokens", f"at most {size}, the rows of the model's embedding")
    tokens, types = _tokens(saved, size)
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
        if missing:
            given = f"without the byte tokens {', '.join(missing[:3])}"
            raise InputError("tokenizer", given, "a SentencePiece tokenizer with all 256 byte tokens, for GGUF")
        return Vocabulary("llama", "default", tokens, types, scores=_scores(tokens, pairs), space_prefix=_prefix(saved))
    merges = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]
    return Vocabulary("gpt2", _rule(saved), tokens, types, merges)


def _tokens(saved: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    model, tokens, types = saved["model"], [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for text, index in model["vocab"].items():
        is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        tokens[index] = text
        types[index] = BYTE if is_byte else UNKNOWN if text == model.get("unk_token") else NORMAL
    for added in saved["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else ADDED
    return tokens, types


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """The rank of the first merge that makes a token, as a negative number; tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(pairs))) for token in tokens]


def _prefix(saved: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    steps = [saved.get("normalizer") or {}, saved.get("pre_tokenizer") or {}]
    steps += [inner for step in steps for inner in step.get("normalizers", step.get("pretokenizers", ()))]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _rule(saved: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that cuts a text into words."""
    step = saved.get("pre_tokenizer") or {}
    steps, found = step.get("pretokenizers", [step]), []
    for each in steps:
        if each.get("type") == "Split":
            found.append(each["pattern"].get("Regex", each["pattern"]))
        elif each.get("type") == "Digits":
            found.append("digits" if each.get("individual_digits") else "numbers")
        elif each.get("type") == "ByteLevel":
            found += ["bytes"] if each.get("use_regex", True) else []
        else:
            found.append(str(each.get("type")))
    rule = _RULES.get((tuple(found), bool(saved["model"].get("ignore_merges"))))
    if rule is None:
        accepted = f"one that cuts texts as the tokenizers {', '.join(_RULES.values())} of llama.cpp do"
        raise InputError("tokenizer", f"pre-tokenizer {found}", accepted)
    return rule
