"""A prompt and its answer as token ids: divided as one text, and token ids as text again."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Divided(NamedTuple):
    """Token ids of a prompt and of the response that continues it; `shared`: the token that lies across the border, if any."""

    prompt: list[int]
    response: list[int]
    shared: str | None = None


def divided(prompts: Sequence[str], responses: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Divided]:
    """The token ids of prompts and responses, those of each pair as of one text, without special tokens around it.

    The prompt has the tokens that it has alone, which is what a model is given to continue. The response has those that it has
    behind the prompt: alone, many tokenizers (SentencePiece) would begin it with a mark of a word, which the text does not have.
    Where no token lies across the border, the two are the whole text; else `shared` names the token.
    """
    alone = encoded(prompts, tokenizer)
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    whole = _Whole(texts, tokenizer)
    return [whole.divided(place, len(prompt), alone[place]) for place, prompt in enumerate(prompts)]


def encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of texts, without special tokens around them."""
    if not texts:
        return []
    return [*tokenizer([*texts], add_special_tokens=False, verbose=False)["input_ids"]]


class _Whole:
    """Texts of a prompt and a response each, as token ids and, of a fast tokenizer, the characters that each token covers."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.offsets = tokenizer, None
        if texts and tokenizer.is_fast:
            found = tokenizer([*texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            self.ids, self.offsets = found["input_ids"], found["offset_mapping"]
        else:
            self.ids = encoded(texts, tokenizer)

    def divided(self, place: int, border: int, prompt: list[int]) -> Divided:
        """One text: `border` characters of it are the prompt, which has these token ids alone."""
        ids = self.ids[place]
        first = len(prompt) if self.offsets is None else _first_from(border, self.offsets[place])
        before, response = ids[:first], ids[first:]
        across = [] if self.offsets is None else [end > border for _, end in self.offsets[place][:first]]
        if not any(across) and (
            before == prompt or (self.offsets is not None and self._same_text(prompt, response, ids))
        ):
            return Divided(prompt, response)
        shared = across.index(True) if any(across) else _first_difference(ids, prompt)
        return Divided(prompt, response, str(self.tokenizer.convert_ids_to_tokens(ids[shared])))

    def _same_text(self, prompt: list[int], response: list[int], ids: list[int]) -> bool:
        """Whether other tokens of the prompt make the same whole: spaces at its end, say. Offsets of some tokenizers
        leave out the space that a token begins with."""
        return bool(self.tokenizer.decode([*prompt, *response]) == self.tokenizer.decode(ids))


def _first_from(border: int, offsets: Sequence[tuple[int, int]]) -> int:
    """The number of the first token that begins at this character or behind it."""
    return next((number for number, (start, _) in enumerate(offsets) if start >= border), len(offsets))


def _first_difference(ids: list[int], prompt: list[int]) -> int:
    """The number of the first token of a text that its prompt alone does not have; the last where it has all."""
    pairs = enumerate(zip(ids, prompt, strict=False))
    return next((number for number, (own, alone) in pairs if own != alone), len(ids) - 1)


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Token ids as text for people, without special tokens: as it continues the text of the tokens before, if any.

    Alone, the first word of an answer would lose its space in many tokenizers (SentencePiece).
    """
    prompt = str(tokenizer.decode([*before], skip_special_tokens=True)) if before else ""
    whole = str(tokenizer.decode([*before, *ids], skip_special_tokens=True))
    return whole[len(prompt) :] if whole.startswith(prompt) else str(tokenizer.decode([*ids], skip_special_tokens=True))
