"""The work ahead: which responses share a batch and a shard. The prompts alone decide it, and the settings."""

from collections.abc import Iterator, Sequence

from distill_llm.common.errors import InputError
from distill_llm.data.answer_choice import LOGPROB, TOKENS
from distill_llm.data.prompt_encoder import CUT, FINISH, GENERATED, TOKENIZER
from distill_llm.responses.folder import ResponseFolder, Row
from distill_llm.responses.prompts import Prompt
from distill_llm.responses.settings import ResponseSettings

SHARD_TOKENS = 1 << 12  # at most, unless a single batch has more: what a process loses when it is stopped


class Work:
    """Responses to be generated, the longest prompts first, so that what needs most memory comes at once.

    Args:
        prompts: the different ones.
        settings: the number of responses to each and at once, their length, and the seed that every row notes.
        tokenizer: the fingerprint of the tokenizer, which every row notes.
    """

    def __init__(self, prompts: Sequence[Prompt], settings: ResponseSettings, tokenizer: str):
        samples, batch_size, max_new_tokens = settings.samples, settings.batch_size, settings.max_new_tokens
        self.prompts, self.batch_size = prompts, batch_size
        self.max_new_tokens, self.seed, self.tokenizer = max_new_tokens, settings.seed, tokenizer
        by_length = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
        self.order = [(place, sample) for place in by_length for sample in range(samples)]
        self.shard_responses = batch_size * max(1, SHARD_TOKENS // (batch_size * max_new_tokens))
        self.shards = range(-(-len(self.order) // self.shard_responses))

    def shard(self, number: int) -> list[tuple[int, int]]:
        """(place of the prompt, number of the sample) of the responses in a shard."""
        return self.order[number * self.shard_responses :][: self.shard_responses]

    def batches(self, number: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of a shard."""
        shard = self.shard(number)
        yield from (shard[start : start + self.batch_size] for start in range(0, len(shard), self.batch_size))

    def key(self, place: int, sample: int) -> bytes:
        """What the random numbers of a response depend on."""
        return self.prompts[place].key + f"{sample} {self.seed}".encode()

    def row(self, place: int, sample: int, text: str, ids: list[int], ended: bool, logprob: float) -> Row:
        """A response with its prompt, as it is written: as text, and as the tokens that were generated, its end among them.

        `logprob`: the sum of the logarithms of their probabilities under the teacher, at temperature 1.
        """
        about = {GENERATED: ids, TOKENIZER: self.tokenizer, LOGPROB: round(logprob, 4)}
        return self.row_of_text(place, sample, text, len(ids), "eos" if ended else CUT) | about

    def row_of_text(self, place: int, sample: int, text: str, tokens: int, finish: str) -> Row:
        """The same of an answer whose tokens are not known, with the reason why it ended: `stop`, or CUT."""
        about = {FINISH: finish, TOKENS: tokens, "sample": sample, "seed": self.seed}
        return {**self.prompts[place].answered(text), **about}

    def by_prompt(self, folder: ResponseFolder) -> list[list[Row]]:
        """The rows of all responses, those to each prompt together, once every shard is there.

        Raises:
            InputError: a shard does not hold what it should.
        """
        found: list[list[Row]] = [[] for _ in self.prompts]
        for number in self.shards:
            expected = self.shard(number)
            rows = folder.read_shard(number, len(expected))
            for (place, sample), row in zip(expected, rows, strict=True):
                if row["sample"] != sample or not self.prompts[place].is_asked_in(row):
                    accepted = "a folder with the responses of this very command, or another output folder"
                    raise InputError("output_dir", f"{folder.folder} with other rows in shard {number}", accepted)
                found[place].append(row)
        return found

    def announcement(self, missing: Sequence[int]) -> str:
        """One line: prompts, responses, the most tokens there can be, and what an earlier start has done."""
        left = sum(len(self.shard(number)) for number in missing)
        done = len(self.order) - left
        return (
            f"{len(self.prompts):,} prompts, {left:,} responses to generate, at most {left * self.max_new_tokens:,} tokens"
            + (f" ({done:,} responses are there already)" if done else "")
        )
