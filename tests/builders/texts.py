"""A tokenizer of words with the special tokens of encoders, and rows of random words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Word `wN` has id 5 + N; texts are put between [CLS] and [SEP]."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(95))])} | {"a": 100}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": SPECIAL[0], "unk_token": SPECIAL[1], "cls_token": SPECIAL[2], "sep_token": SPECIAL[3]}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token=SPECIAL[4], model_max_length=64, padding_side=side, **names
    )


def sentences(count: int, length: int, seed: int = 0) -> list[dict]:
    """Rows of `length` random words."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 60, (count, length), generator=draw).tolist()
    return [{"input_ids": [2, *row, 3], "attention_mask": [1] * (length + 2), "length": length + 2} for row in words]
