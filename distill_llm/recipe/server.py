"""The section `teacher.server`: a model behind an OpenAI-compatible endpoint teaches."""

from typing import Literal

from pydantic import Field

from distill_llm.recipe.section import Section


class ServerSection(Section):
    """A served model teaches in the place of `teacher.model`, whose tokenizer it has.

    The student is still cut from `teacher.model` and compared with it in the report. A key is read from the environment alone."""

    url: str = Field(min_length=1, description="address up to the version, for example http://localhost:8000/v1")
    model: str | None = Field(
        default=None, min_length=1, description="what the server calls the model; left out: teacher.model"
    )
    k: int = Field(
        default=20,
        ge=1,
        le=255,
        description="likeliest tokens asked for at each place (vLLM gives as many as its --max-logprobs)",
    )
    form: Literal["prompt_logprobs", "echo"] = Field(
        default="prompt_logprobs",
        description="how log-probabilities of given text are asked for: by vLLM's prompt_logprobs, or by echo and logprobs of"
        " OpenAI's older completions",
    )
    key_variable: str = Field(
        default="OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the key, if the server wants one",
    )
    timeout: float = Field(
        default=120.0, gt=0, allow_inf_nan=False, description="seconds that the server may be silent"
    )
    retries: int = Field(default=6, ge=0, le=100, description="how often a request is sent again, later each time")
    parallel: int = Field(default=8, ge=1, le=256, description="requests at once")
