"""Answers of a served model: prompts go as token ids, answers come back as text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.models.endpoint import Client, Endpoint
from distill_llm.responses.prompts import Prompt
from distill_llm.responses.sampling import Sampling

CUT = ("length", "content_filter", "abort", "error")
"""Reasons for which an answer stops before its end; all others, and none, are ends."""


@dataclass(frozen=True)
class ServedAnswer:
    """The text of an answer, its number of tokens, and whether it has its end."""

    text: str
    tokens: int
    ended: bool


class ServedAnswers:
    """Asks a server to answer prompts.

    Each answer is drawn with a seed of its own, of its prompt, its sample and the seed of all. Whether the same seed gives
    the same answer again is up to the server.

    Args:
        endpoint: where the model is served.
        sampling: the settings.
        tokenizer: counts the tokens of answers where the server does not say.
    """

    def __init__(self, endpoint: Endpoint, sampling: Sampling, tokenizer: PreTrainedTokenizerBase):
        self.client, self.sampling, self.tokenizer = Client(endpoint), sampling, tokenizer

    def __call__(self, prompts: Sequence[Prompt], keys: Sequence[bytes]) -> list[ServedAnswer]:
        """An answer to each prompt.

        Args:
            keys: what the seed of each answer depends on.

        Raises:
            InputError: as `Client.post`; an answer that is no completion.
        """
        return self.client.each(self._answer, list(zip(prompts, keys, strict=True)))

    def _answer(self, asked: tuple[Prompt, bytes]) -> ServedAnswer:
        prompt, key = asked
        how, body = self.sampling, dict[str, Any]()
        body |= {"prompt": prompt.ids, "max_tokens": how.max_new_tokens, "temperature": how.temperature}
        body |= {"top_p": how.top_p} if how.top_p < 1 else {}
        body |= {"top_k": how.top_k} if how.top_k else {}  # of vLLM; others refuse it
        if how.temperature:
            body["seed"] = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1
        found = self.client.post("completions", body)
        try:
            text, reason = found["choices"][0]["text"], found["choices"][0].get("finish_reason")
        except (LookupError, TypeError, AttributeError):
            text = reason = None
        if not isinstance(text, str):
            there, accepted = self.client.endpoint, "an endpoint whose completions have a text"
            raise InputError(f"{there.field}.url", there.url, accepted)
        usage = found.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int):
            count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ServedAnswer(text, count, reason not in CUT)
