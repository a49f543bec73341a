"""Log-probabilities of given tokens from a served model: the top k at each place, as sparse targets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.special_tokens import token_count
from distill_llm.losses.sparse import SparseTargets, entropy_of
from distill_llm.models.endpoint import Client

Form = Literal["prompt_logprobs", "echo"]
FORMS = ("prompt_logprobs", "echo")
TOKEN_ID = "token_id:"
AMBIGUOUS = -1
EXCESS = 0.02  # over 1 that probabilities may sum to: servers round
TEXTS = 0.75  # of the log-probabilities that were asked for by text: tokens that share a text have one entry


@dataclass(frozen=True)
class Asking:
    """What is asked of a server.

    Attributes:
        k: log-probabilities of each place.
        form: `prompt_logprobs`, vLLM's field, whose answer names tokens by their ids; or `echo`, the old form of OpenAI's
            completions (`echo` with `logprobs` and no new token), whose answer names them by their texts.
    """

    k: int
    form: Form = "prompt_logprobs"


class ServedLogprobs:
    """Asks a server for the distributions of the tokens of sequences.

    Args:
        client: of the endpoint.
        tokenizer: of the sequences, which must be the served model's.
        asking: what is asked.
        classes: how many of the first tokens count; what the model gives others goes to the rest.
    """

    def __init__(self, client: Client, tokenizer: PreTrainedTokenizerBase, asking: Asking, classes: int):
        self.client, self.tokenizer, self.asking, self.classes = client, tokenizer, asking, classes

    def __call__(self, sequences: Sequence[list[int]]) -> list[SparseTargets]:
        """Of each sequence (T tokens) the targets of T - 1 places: what the model expects after each token but the last.

        Ids ascend; entries of probability 0 are padding.

        Raises:
            InputError: what `Client.post` raises; no log-probabilities, fewer than were asked for, or other tokens.
        """
        return self.client.each(self._targets, list(sequences))

    def _targets(self, ids: list[int]) -> SparseTargets:
        if len(ids) < 2:
            return sparse_targets([], self.asking.k)
        by_id = self.asking.form == "prompt_logprobs"
        places = self._prompt_logprobs(ids) if by_id else self._echo(ids)
        counts, asked = [len(place) for place in places], min(self.asking.k, self.classes)
        most = min(counts) if by_id else max(counts)  # one more where the token that is there is not among them
        if most < (asked if by_id else TEXTS * asked):
            fix = f"set it to {most} at most, or let the server give more (vLLM: --max-logprobs)"
            raise self._fault("k", f"{self.asking.k}, and the server gives {most}", fix)
        if not all(map(_is_part_of_a_distribution, places)):
            raise self._none("serve the model's own log-probabilities: these are not numbers, or add up to more than 1")
        return sparse_targets([self._top(place) for place in places], self.asking.k)

    def _top(self, place: Mapping[int, float]) -> list[tuple[int, float]]:
        """The k likeliest, without what is no token of the tokenizer."""
        likeliest = sorted(place.items(), key=lambda each: -each[1])[: self.asking.k]
        return [each for each in likeliest if 0 <= each[0] < self.classes]

    def _prompt_logprobs(self, ids: list[int]) -> list[dict[int, float]]:
        """vLLM's answer: for each token of the prompt but the first a mapping of token ids to log-probabilities."""
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": self.asking.k}
        answer = self.client.post("completions", asked)
        choice = _choice(answer)
        places = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
        if not isinstance(places, list):
            raise self._none("let vLLM serve it, or set form to echo")
        try:
            found = [{int(name): float(each["logprob"]) for name, each in place.items()} for place in places[1:]]
        except (TypeError, ValueError, KeyError, AttributeError):
            raise self._none("its prompt_logprobs are not in vLLM's form") from None
        if len(found) != len(ids) - 1 or any(token not in place for token, place in zip(ids[1:], found, strict=True)):
            raise self._other_tokens(len(found) + 1, len(ids))
        shown = [
            (place.get(str(token)) or {}).get("decoded_token") for token, place in zip(ids[1:], places[1:], strict=True)
        ]
        if self._are_others(shown, ids[1:]):
            raise self._other_tokens(len(found) + 1, len(ids))
        return found

    def _echo(self, ids: list[int]) -> list[dict[int, float]]:
        """OpenAI's answer: the texts of tokens, and for each but the first a mapping of texts to log-probabilities."""
        asked = {"prompt": ids, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": self.asking.k}
        logprobs = _choice(self.client.post("completions", asked)).get("logprobs")
        said = logprobs if isinstance(logprobs, dict) else {}
        tops, tokens = said.get("top_logprobs"), said.get("tokens")
        if not isinstance(tops, list) or not isinstance(tokens, list):
            raise self._none("set form to prompt_logprobs if vLLM serves it")
        texts = [text for text in tokens[: len(ids)] if isinstance(text, str)]
        if len(texts) < len(ids) or self._are_others(texts, ids):
            raise self._other_tokens(len(tokens), len(ids))
        places = tops[1 : len(ids)]
        if len(places) < len(ids) - 1 or not all(isinstance(place, dict) for place in places):
            raise self._none("set form to prompt_logprobs if vLLM serves it")
        return [self._by_id(place) for place in places]

    def _by_id(self, place: Mapping[str, float]) -> dict[int, float]:
        """Texts as ids; those that several tokens share, or none has, get numbers below 0, and so go to the rest."""
        found: dict[int, float] = {}
        for number, (text, logprob) in enumerate(place.items(), 1):
            token = self._id_of(text)
            found[-number if token == AMBIGUOUS or token in found else token] = float(logprob)
        return found

    def _id_of(self, text: str) -> int:
        if text.startswith(TOKEN_ID) and text.removeprefix(TOKEN_ID).isdigit():
            return int(text.removeprefix(TOKEN_ID))
        return self._ids.get(text, AMBIGUOUS)

    def _are_others(self, shown: Sequence[Any], ids: Sequence[int]) -> bool:
        """Whether the texts are of other tokens: a few may differ, since parts of characters are written in several ways."""
        known = [
            (text.strip(), token)
            for text, token in zip(shown, ids, strict=True)
            if isinstance(text, str) and text.strip()
        ]
        accepted = (
            (text, {f"{TOKEN_ID}{token}", *(each.strip() for each in self._texts[token])}) for text, token in known
        )
        return 2 * sum(text not in names for text, names in accepted) > len(known)

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        """Of each token its text, and its name in the vocabulary: servers give one or the other."""
        ids = range(token_count(self.tokenizer))
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [(str(self.tokenizer.decode([token])), str(name)) for token, name in zip(ids, names, strict=True)]

    @cached_property
    def _ids(self) -> dict[str, int]:
        """By text the one token that has it."""
        found: dict[str, int] = {}
        for token, texts in enumerate(self._texts):
            for text in {*texts}:
                found[text] = AMBIGUOUS if found.get(text, token) != token else token
        return found

    def _fault(self, name: str, given: Any, fix: str) -> InputError:
        return InputError(f"{self.client.endpoint.field}.{name}", given, fix=fix)

    def _none(self, fix: str) -> InputError:
        return self._fault("form", self.asking.form, f"{fix}: the server gave no log-probabilities of the tokens sent")

    def _other_tokens(self, got: int, sent: int) -> InputError:
        fix = "serve a model with the tokenizer of the data: the server's tokens are not those that were sent"
        return self._fault("model", f"{self.client.endpoint.model} ({sent} tokens sent, {got} read)", fix)


def _is_part_of_a_distribution(place: Mapping[int, float]) -> bool:
    """Whether these may be log-probabilities of one place."""
    return all(p <= EXCESS for p in place.values()) and sum(map(math.exp, place.values())) <= 1 + EXCESS


def sparse_targets(places: Sequence[Sequence[tuple[int, float]]], k: int) -> SparseTargets:
    """Targets (places, k) of log-probabilities by token."""
    ids, p = torch.zeros(len(places), k, dtype=torch.int64), torch.zeros(len(places), k, dtype=torch.float64)
    for number, place in enumerate(places):
        for at, (token, logprob) in enumerate(sorted(place)):
            ids[number, at], p[number, at] = token, math.exp(min(0.0, logprob))
    total = p.sum(-1, keepdim=True)
    p = p / total.clamp(min=1)  # more than 1 by rounding
    rest = (1 - p.sum(-1)).clamp(min=0)
    held, others = p.float(), rest.float()
    return SparseTargets(ids, held, others, entropy_of(held, others))


def _choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of a completion."""
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        return {}
    return choice if isinstance(choice, dict) else {}
