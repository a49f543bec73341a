"""Pushing a finished student to the Hugging Face Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.models.finding import first_line
from distill_llm.report.usage import read_config

LEFT_OUT = ["checkpoint-*", "*.pt", "*.bin", "**/__pycache__/**", "__pycache__/**", ".*", "**/.*"]


def push(student_dir: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a student's folder: weights, configuration, tokenizer, model card and evaluation results, in one commit.

    A repository that does not exist is created. The code in the model card is changed to load from the repository. Checkpoints
    and optimizer states are left out.

    Args:
        student_dir: a folder with a saved model, for example `student/` of a run.
        repo_id: `name` or `owner/name`.
        private: make the repository private when it is created.
        token: a token with write access; None: the one of `hf auth login` or of the variable HF_TOKEN.

    Returns:
        The address of the repository.

    Raises:
        InputError: the folder holds no model, the Hub does not accept the name, the token is missing or may not write, or
            the Hub is switched off or cannot be reached.
    """
    student_dir = Path(student_dir)
    read_config(student_dir)
    if not any(student_dir.glob("*.safetensors")):
        raise InputError("student_dir", str(student_dir), "a folder with a model's weights (*.safetensors)")
    check_repo_id(repo_id)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        _name_the_repository(student_dir / "README.md", repo.repo_id)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=student_dir,
            commit_message="Upload the student, its card and its evaluation results",
            ignore_patterns=LEFT_OUT,
        )
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE", "1", fix="unset it: pushing needs the Hub") from error
    except LocalTokenNotFoundError as error:
        raise InputError(
            "token", None, fix="run `hf auth login`, or set HF_TOKEN, with a token that has write access"
        ) from error
    except HfHubHTTPError as error:
        accepted = f"a repository that the Hub accepts ({first_line(error)})"
        if error.response is not None and error.response.status_code in (401, 403):
            accepted = "a repository that the token of `hf auth login` or HF_TOKEN may write to"
        raise InputError("repo_id", repo_id, accepted) from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # httpx or httpx2, by the version of huggingface_hub
            raise
        fix = f"push again when the Hub can be reached ({first_line(error)})"
        raise InputError("repo_id", repo_id, fix=fix) from error
    return str(repo)


def check_push(repo_id: str, field: str) -> None:
    """Check, before a run, what its push will need: a valid name, a token, and a Hub that is not switched off.

    Raises:
        InputError: naming `field`.
    """
    check_repo_id(repo_id, field)
    if is_offline_mode():
        raise InputError(field, repo_id, fix="unset HF_HUB_OFFLINE, or leave the push out: the Hub is switched off")
    if get_token() is None:
        raise InputError(
            field, repo_id, fix="log in first (`hf auth login`, or HF_TOKEN): a push needs a token with write access"
        )


def check_repo_id(repo_id: str, field: str = "repo_id") -> None:
    """Raise an InputError if the Hub does not accept this repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        accepted = "NAME or OWNER/NAME of letters, digits, '-', '_' and '.', at most 96 characters"
        raise InputError(field, repo_id, accepted) from error


def _name_the_repository(card: Path, repo_id: str) -> None:
    if card.exists():
        text = card.read_text()
        with written_whole(card) as file:
            file.write_text(re.sub(r'^model_id = ".*"$', f'model_id = "{repo_id}"', text, count=1, flags=re.MULTILINE))
