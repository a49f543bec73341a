"""What decides the responses of a teacher, as one object from the command to the work."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.responses.sampling import Sampling


@dataclass(frozen=True)
class ResponseSettings(Sampling):
    """How prompts are read, asked and answered. The fields of `Sampling` come first.

    Args:
        batch_size: responses at once.
        prompt_column: by default `prompt`, else `messages`.
        chat: ask texts in the words of the chat template; rows are then chats.
        chat_template_kwargs: what the template is given beside the chats, such as `enable_thinking`.
        max_prompts: only the first rows.
        dtype: of a teacher given by name: float32, bfloat16 or float16; by default bfloat16 on CUDA, else float32.
        keep_truncated: keep responses that reached `max_new_tokens`; may be changed later without generating again.
        trust_remote_code: run the code that a teacher given by name brings along, if it does.
        separator, encoding: how files with prompts are written (see `distill_llm.data.files.FileFormat`).

    Raises:
        InputError: names the value that is out of its range.
    """

    batch_size: int = 8
    prompt_column: str | None = None
    chat: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_prompts: int | None = None
    dtype: str | None = None
    keep_truncated: bool = False
    trust_remote_code: bool = False
    separator: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "max_prompts"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise InputError(name, number, "a whole number of at least 1")

    def recorded(self, dtype: str, shard_responses: int) -> dict[str, Any]:
        """The settings as `responses.json` keeps them: all that decide a response, and the shards.

        Args:
            dtype: what the teacher's weights are in.
            shard_responses: responses in a shard.
        """
        kwargs = dict(self.chat_template_kwargs) if self.chat_template_kwargs else None
        settings = {**asdict(self), "chat_template_kwargs": kwargs, "dtype": dtype, "shard_responses": shard_responses}
        for name in ("keep_truncated", "trust_remote_code", "separator", "encoding"):  # prompts have a fingerprint
            del settings[name]
        return settings
