"""Texts, rows and models for a teacher with a tokenizer of its own."""

from builders.trainers import causal_model
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.data.causal import as_rows

TEXTS = ["yes bc 4 yes", "a=4. yes bc", "yes", "bc bc é yes: abc", "yes yes 4é", "4 4 4 yes bc", "bc", "a b c yes"]
TERM = {"cross_tokenizer": {"temperature": 2.0}}


def rows_of(tokenizer, texts=TEXTS, prompt=1) -> Dataset:
    """Encoded rows that end, the first tokens without a label."""
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    labels = [[*[-100] * prompt, *each[prompt:]] for each in ids]
    return Dataset.from_dict(as_rows(ids, labels))


def model_for(tokenizer, seed=0, spare=0, **config) -> PreTrainedModel:
    """A decoder with the tokens of a tokenizer, and some rows to spare."""
    ids = {"pad_token_id": None, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return causal_model(
        vocab_size=max(tokenizer.get_vocab().values()) + 1 + spare, seed=seed, layers=2, **ids, **config
    )
