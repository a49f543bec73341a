"""Pushing to the Hugging Face Hub: a student, adapters, an exported model, a teacher cache or responses."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from distill_llm.common.errors import InputError, first_line
from distill_llm.common.notices import tell
from distill_llm.common.secrets import hidden
from distill_llm.report.uploads import CARD, RepoType, find_upload

OLD_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
"""Weights as a push names them. transformers might read old ones in place of the new ones."""
BY = "with distill_llm"
"""The end of a push's commit message. It tells a card of this package's from one that people wrote in the repository."""
LOG_IN = "run `hf auth login`, or set HF_TOKEN, with a token that has write access"


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    repo_type: RepoType | None = None,
) -> str:
    """Upload a folder in one commit: what is in the repository is the old state or the new one, never a mixture.

    A repository that does not exist is created. In one that exists, files of other names stay, but for a model's old weights; so
    does a card that was edited there. The code in the model card loads from the repository. Checkpoints and optimizer states are
    left out. After a broken connection the same call goes on: what arrived is not sent again.

    Args:
        folder: a student, adapters, an exported model, a teacher cache or responses; or a GGUF file.
        repo_id: `name` or `owner/name`.
        private: make the repository private when it is created.
        token: a token with write access; None: the one of `hf auth login` or of the variable HF_TOKEN.
        repo_type: `model` or `dataset`; None: by what the folder is.

    Returns:
        The address of the repository.

    Raises:
        InputError: the folder is nothing that can be pushed, or one of its files holds a token; the Hub does not accept the
            name, the token is missing or may not write, the repository is public and `private` was asked for, or the Hub is
            switched off or cannot be reached.
    """
    upload = find_upload(folder)
    check_repo_id(repo_id)
    token = token or get_token()
    upload.check_secrets(token)
    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE", "1", fix="unset it: pushing needs the Hub")
    if token is None:
        raise InputError("token", None, fix=LOG_IN)
    kind = repo_type or upload.repo_type
    api = HfApi(token=token)
    with _in_one_line(api, "repo_id", repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind)
        there = api.repo_info(url.repo_id, repo_type=kind)
        if private and not there.private:
            raise InputError(
                "private", True, fix=f"make {url.repo_id} private on the Hub first: it exists, and is public"
            )
        old = [file.rfilename for file in there.siblings or []]
        files = upload.contents(url.repo_id)
        if CARD in old and _edited_there(api, url.repo_id, kind):
            del files[CARD]
            tell(
                f"{CARD} in {url.repo_id} was not written by a push, so it stays; to replace it, delete it there and push again"
            )
        api.create_commit(
            url.repo_id,
            operations=_operations(files, old if upload.replaces_weights else []),
            commit_message=f"Upload {upload.what} {BY}",
            repo_type=kind,
        )
    return str(url)


def _edited_there(api: HfApi, repo_id: str, kind: RepoType) -> bool:
    """Whether a repository's card was last written by something other than a push, or the Hub as it made the repository."""
    cards = api.get_paths_info(repo_id, CARD, expand=True, repo_type=kind)
    titles = [card.last_commit.title for card in cards if card.last_commit is not None]
    return any(title != "initial commit" and not title.endswith(BY) for title in titles)


def _operations(
    files: Mapping[str, Path | bytes], old: Iterable[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What the commit does: add all files, and remove old weights that have other names."""
    stale = [name for name in old if name not in files and any(fnmatch(name, each) for each in OLD_WEIGHTS)]
    return [
        *(CommitOperationDelete(name) for name in stale),
        *(CommitOperationAdd(path, file) for path, file in files.items()),
    ]


@contextmanager
def _in_one_line(api: HfApi, field: str, repo_id: str) -> Iterator[None]:
    """What the Hub or the network refuse, as one line without the token."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        fix = _what_to_do(error, api, repo_id)
        if fix is None:
            raise
        raise InputError(field, repo_id, fix=hidden(fix, str(api.token))) from error


def _what_to_do(error: Exception, api: HfApi, repo_id: str) -> str | None:
    """What helps against an error of huggingface_hub, its HTTP library or Xet; None for another kind of error."""
    cause: BaseException | None = error
    while cause is not None:  # an upload's error is inside a RuntimeError
        why = first_line(cause)
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code if cause.response is not None else 0
            if status == 401:
                return f"the Hub does not accept the token: {LOG_IN}"
            if status == 403:
                return f"push to a repository of your own, or use a token that may write to this one: {_belongs(api)}"
            if status == 429 or status >= 500:
                return f"push again later: the Hub answers {status}, and what arrived is not sent again"
            return f"the Hub refuses the push: {why}"
        if "xet" in why.lower():
            return (
                "push again when the network is back, with HF_HUB_DISABLE_XET=1 where the Hub has no Xet storage"
                f" ({why})"
            )
        # httpx or httpx2, by the version of huggingface_hub
        if type(cause).__module__.startswith("httpx") or isinstance(cause, (ConnectionError, TimeoutError)):
            return f"push again when the Hub can be reached: what arrived is not sent again ({why})"
        cause = cause.__cause__ or cause.__context__
    return None


def _belongs(api: HfApi) -> str:
    try:
        return f"this one belongs to {api.whoami(cache=True)['name']}"
    except Exception:  # only a help
        return "this one may not"


def check_push(repo_id: str, field: str) -> None:
    """Check, before a run, what its push will need: a valid name, a Hub that answers, and a token that may write there.

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
    api = HfApi(token=get_token())
    with _in_one_line(api, field, repo_id):
        who = api.whoami(cache=True)
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError(field, repo_id, fix=f"{LOG_IN}: this one can only read")
    names = [who["name"], *(each["name"] for each in who.get("orgs", []))]
    owner = repo_id.partition("/")[0]
    if role == "write" and "/" in repo_id and owner.lower() not in [name.lower() for name in names]:
        raise InputError(field, repo_id, fix=f"name a repository of {' or '.join(names[:5])}: the token is theirs")


def check_repo_id(repo_id: str, field: str = "repo_id") -> None:
    """Raise an InputError if the Hub does not accept this repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        accepted = "NAME or OWNER/NAME of letters, digits, '-', '_' and '.', at most 96 characters"
        raise InputError(field, repo_id, accepted) from error
