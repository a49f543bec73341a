"""What comes before a question to the Hugging Face Hub: whether a name can be there, and one short try to reach it."""

import os
from functools import cache

from distill_llm.common.errors import InputError, first_line

SECONDS = 5
"""How long the Hub has to answer."""
FILES = (
    ".bin",
    ".csv",
    ".gguf",
    ".gz",
    ".json",
    ".jsonl",
    ".parquet",
    ".safetensors",
    ".tsv",
    ".txt",
    ".yaml",
    ".yml",
    ".zip",
)
"""Names with these ends are files of this machine."""


class _Unreachable(Exception):
    """The Hub did not answer; the text says why."""


def check_hub_name(name: str, field: str, given: str, accepted: str) -> None:
    """Check that a name which is no file or folder here can be asked for on the Hub, and that the Hub can be reached.

    transformers and datasets would ask for a minute and a half before they give up. With HF_HUB_OFFLINE nothing is tried: the
    libraries look in the local cache.

    Args:
        name: what the Hub would be asked for.
        field, given, accepted: for the error where the name is a path.

    Raises:
        InputError: naming `field`.
    """
    from huggingface_hub import is_offline_mode

    if _looks_like_a_path(name):
        raise InputError(field, given, accepted)
    if is_offline_mode():
        return
    try:
        _reach()
    except _Unreachable as error:
        fix = (
            "check the name and the network; with HF_HUB_OFFLINE=1 what the local cache holds is used: no such file or"
            f" folder is here, and the Hub cannot be reached ({error})"
        )
        raise InputError(field, given, fix=fix) from None


def _looks_like_a_path(name: str) -> bool:
    """Whether a name is no repository of the Hub: by its form, or by its end."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith((".", "~")) or os.path.splitext(name)[1].lower() in FILES


@cache  # of success: errors are not kept, and a network may come back
def _reach() -> None:
    """One short try.

    Raises:
        _Unreachable: no answer, or a proxy's.
    """
    from huggingface_hub import constants, get_session

    try:
        answer = get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # httpx or httpx2, by the version of huggingface_hub
            raise
        raise _Unreachable(first_line(error)) from None
    if answer.status_code >= 500:
        raise _Unreachable(f"it answers {answer.status_code}")
