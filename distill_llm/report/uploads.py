"""What of a folder goes to the Hub, by what the folder is."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distill_llm.common.errors import InputError
from distill_llm.common.secrets import holds_token
from distill_llm.report.other_cards import (
    adapter_card,
    cache_card,
    export_card,
    model_card,
    origin_of_export,
    responses_card,
    shown_about,
    shown_adapters,
)
from distill_llm.report.usage import read_config
from distill_llm.responses.folder import ABOUT, KEPT
from distill_llm.teachers.cache_format import INDEX_NAME, read_index

CARD = "README.md"
RESULTS = ".eval_results"
"""The one hidden folder that is uploaded: evaluation results, which the Hub shows beside the model."""
TEXTS = (".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja")
ACCEPTED = (
    "a GGUF file, or a folder with a model (config.json, *.safetensors), adapters, a teacher cache, finished responses or an"
    " export"
)
_TRAINING, _STATES = ("checkpoint-", "__pycache__"), (".bin", ".pt", ".pth")
_MODEL, _ADAPTERS, _EXPORT, _CACHE, _RESPONSES = (
    "the model",
    "the adapters",
    "the exported model",
    "the teacher cache",
    "the responses",
)

RepoType = Literal["model", "dataset"]
Made = Callable[[str], str]


@dataclass(frozen=True)
class Upload:
    """What is uploaded.

    Attributes:
        what: the words for it.
        repo_type: the kind of repository that it belongs in.
        files: by path in the repository, in the order of the paths.
        made: texts by path, made for the repository with this name.
    """

    what: str
    repo_type: RepoType
    files: Mapping[str, Path]
    made: Mapping[str, Made] = field(default_factory=dict)

    @property
    def replaces_weights(self) -> bool:
        """Whether weights of a model that are in the repository under other names are old."""
        return self.what == _MODEL

    def contents(self, repo_id: str) -> dict[str, Path | bytes]:
        """Files, and the contents of those that are made, by path. A card is changed to load from the repository."""
        found: dict[str, Path | bytes] = {path: make(repo_id).encode() for path, make in self.made.items()}
        if CARD in self.files:
            text = self.files[CARD].read_text(encoding="utf-8")
            named = re.sub(r'^model_id = ".*"$', f'model_id = "{repo_id}"', text, count=1, flags=re.MULTILINE)
            found[CARD] = named.encode()
        return {**self.files, **found}

    def check_secrets(self, token: str | None) -> None:
        """Check that no file of text holds an access token.

        Raises:
            InputError: naming the file.
        """
        for path, file in self.files.items():
            if file.suffix in TEXTS and _any_line(file, token):
                fix = f"take the access token out of {path}: it would be uploaded"
                raise InputError("folder", str(file), fix=fix)


def find_upload(folder: str | Path) -> Upload:
    """What a folder, or a GGUF file, is, and the files of it that others need: no checkpoints, optimizer states or hidden files.

    Raises:
        InputError: it is nothing that can be pushed, or is not complete.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and os.path.isfile(
        folder
    ):  # unlike that of pathlib, also for a name that no file can have
        return Upload(
            _EXPORT,
            "model",
            {folder.name: folder},
            {CARD: lambda repo: export_card([folder.name], repo, origin_of_export(folder))},
        )
    files = {file.relative_to(folder).as_posix(): file for file in sorted(_wanted(folder))}
    found = _found(folder, files)
    return found if CARD not in found.files else Upload(found.what, found.repo_type, found.files, _without_card(found))


def _found(folder: Path, files: dict[str, Path]) -> Upload:
    """The upload of a folder, with a card made for it even if it has one."""
    if "adapter_config.json" in files:
        _needs(folder, files, "adapter_model.safetensors")
        adapters: dict[str, Made] = {
            "adapter_config.json": lambda _: shown_adapters(folder),
            CARD: lambda repo: adapter_card(folder, repo),
        }
        return Upload(_ADAPTERS, "model", files, adapters)
    if ABOUT in files:
        _needs(folder, files, KEPT)
        files = {path: file for path, file in files.items() if path in (ABOUT, KEPT, CARD)}
        made: dict[str, Made] = {ABOUT: lambda _: shown_about(folder), CARD: lambda repo: responses_card(folder, repo)}
        return Upload(_RESPONSES, "dataset", files, made)
    if INDEX_NAME in files:
        index = read_index(folder)
        _needs(folder, files, *(index.shard_path(folder, number).name for number in range(len(index.shards))))
        return Upload(_CACHE, "dataset", files, {CARD: lambda repo: cache_card(index, repo)})
    if graphs := [path for path in files if path.endswith((".onnx", ".gguf"))]:
        return Upload(
            _EXPORT,
            "model",
            files,
            {CARD: lambda repo: export_card(graphs, repo, origin_of_export(folder / graphs[0]))},
        )
    if "config.json" not in files or not any(path.endswith(".safetensors") for path in files):
        raise InputError("folder", str(folder), ACCEPTED)
    read_config(folder)
    return Upload(_MODEL, "model", files, {CARD: lambda repo: model_card(folder, repo)})


def _without_card(upload: Upload) -> dict[str, Made]:
    return {path: make for path, make in upload.made.items() if path != CARD}


def _wanted(folder: Path) -> Iterator[Path]:
    """Files of a folder, without what training, the system or an editor left in it."""
    for file in folder.rglob("*") if os.path.isdir(folder) else ():
        first, *rest = file.relative_to(folder).parts
        names = rest if first == RESULTS else [first, *rest]
        left = file.suffix in _STATES or any(name.startswith((".", *_TRAINING)) for name in names)
        if not left and file.is_file():
            yield file


def _needs(folder: Path, files: Mapping[str, Path], *names: str) -> None:
    if missing := [name for name in names if name not in files]:
        raise InputError("folder", str(folder), f"a complete folder: {', '.join(missing[:3])} is missing")


def _any_line(file: Path, token: str | None) -> bool:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return any(holds_token(line, token) for line in lines)
