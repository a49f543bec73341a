"""Where rows come from: `package://` paths, files, folders of split files, and data sets on the Hub."""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from distill_llm.common.errors import InputError
from distill_llm.common.hub import check_hub_name

PACKAGE = "package://"
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "val", "valid", "eval"),
    "test": ("test",),
}
DOCUMENT_MARK = "<|endoftext|>"
LONGEST_DOCUMENT = 100_000
Splits = dict[str, Dataset]


def resolve_path(text: str, field: str = "path") -> str:
    """The file or folder that `package://PKG/PATH` names inside an installed package; any other text with its `~` expanded.

    The package is only located, not imported: it need not work.

    Args:
        text: a path, a Hub id, or `package://PKG/PATH`.
        field: the name of the setting, for the error.

    Raises:
        InputError: the package is not installed or has no such path.
    """
    if not text.startswith(PACKAGE):
        return os.path.expanduser(text)
    package, _, inside = text.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(field, text, f"package://PKG/PATH with an installed package ({package!r} is not installed)")
    for folder in spec.submodule_search_locations:
        if os.path.exists(found := os.path.join(folder, inside)):
            return found
    raise InputError(field, text, f"a path inside the package {package!r} (it has no {inside!r})")


def read_splits(path: str, config: str | None = None, field: str = "data.path", training: bool = True) -> Splits:
    """All splits of a file, a folder or a Hub data set, under the names `train`, `validation` and `test`.

    A lone file is `train`. In a folder, files are told apart by their names (`train.csv`, `dev.jsonl`, ...); text files
    with other names make up `train` together. What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote is read back
    (a lone one is `train`). Anything else goes through `datasets.load_dataset`: a folder laid out as a Hub repository, or a
    Hub id, with the configuration after a colon (`Salesforce/wikitext:wikitext-2-raw-v1`).

    Args:
        path: file, folder, or Hub id, as `resolve_path` gives it.
        config: the configuration to load where the path does not name one.
        field: the name of the setting, for the error.
        training: whether training rows are needed; without them any of the other splits will do.

    Raises:
        InputError: nothing is there, or it cannot be read, or the rows that are needed are missing.
    """
    name, _, given = path.partition(":")
    here = Path(path)
    if os.path.isfile(path):  # unlike that of pathlib, also for a name that no file can have
        return {"train": _read_files([here], field)}
    if is_saved(here):
        splits = _load(lambda: _saved(path), path, field)
    elif os.path.isdir(path) and (files := _split_files(here)):
        splits = {split: _read_files(found, field) for split, found in files.items()}
    else:
        if not os.path.isdir(name):
            check_hub_name(name, field, path, "an existing file or folder, or the id of a data set on the Hub")
        splits = _load(lambda: load_dataset(name, given or config), path, field)
    if not splits or (training and "train" not in splits):
        raise InputError(field, path, f"data with a train split (found: {', '.join(splits) or 'no data files'})")
    return splits


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    dict_file, *files = (
        os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json", "dataset_info.json")
    )
    return dict_file or all(files)


def _saved(folder: str) -> Any:
    """What `save_to_disk` wrote, as plain values.

    `datasets` writes the order of shuffled rows into that folder; where it may not, the rows are kept in memory.
    """
    return load_from_disk(folder, keep_in_memory=not os.access(folder, os.W_OK)).with_format(None)


def _load(load: Callable[[], Any], path: str, field: str) -> Splits:
    try:
        loaded = load()
    except Exception as error:  # `datasets` raises many kinds
        accepted = f"an existing file or folder, or the id of a data set on the Hub ({_one_line(error)})"
        raise InputError(field, path, accepted) from error
    if isinstance(loaded, Dataset):
        return {"train": loaded}
    known = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in (*aliases, f"{aliases[0]}_matched")}
    return {known[split]: rows for split, rows in loaded.items() if split in known}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    readable = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS)
    found: dict[str, list[Path]] = {}
    for split, aliases in SPLIT_NAMES.items():
        if files := [file for file in readable if file.stem.lower() in aliases]:
            found[split] = files
    texts = [file for file in readable if file.suffix.lower() == ".txt"]
    return found or ({"train": texts} if texts else {})


def _read_files(files: list[Path], field: str) -> Dataset:
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= set(READERS):
        raise InputError(field, ", ".join(map(str, files)), f"files of one kind out of {', '.join(READERS)}")
    kind = kinds.pop()
    names = [str(file) for file in files]
    try:
        if kind == ".txt":
            stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            return Dataset.from_generator(read_documents, gen_kwargs={"files": names, "stamps": stamps}, split="train")
        options: dict[str, Any] = {"keep_default_na": False} if READERS[kind] == "csv" else {}
        if kind == ".tsv":
            options |= {"sep": "\t", "quoting": 3}
        return load_dataset(READERS[kind], data_files=names, split="train", **options)
    except Exception as error:
        raise InputError(field, ", ".join(names), f"a well-formed {kind} file ({_one_line(error)})") from error


def read_documents(files: list[str], stamps: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
    """Documents of plain text files, as rows with a `text` column.

    Documents end at `<|endoftext|>`, at a blank line, or at the first line end after 100,000 characters.

    Args:
        files: the paths, UTF-8 (a wrong byte becomes U+FFFD).
        stamps: size and time of change of each file; `datasets` keys its cache by the arguments.
    """
    for file in files:
        kept: list[str] = []
        length = 0  # of what is kept
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                *ended, rest = line.split(DOCUMENT_MARK)
                for part in ended:
                    yield from _document([*kept, part])
                    kept, length = [], 0
                kept.append(rest)
                length += len(rest)
                if not line.strip() or length > LONGEST_DOCUMENT:
                    yield from _document(kept)
                    kept, length = [], 0
        yield from _document(kept)


def split_documents(texts: Iterable[str]) -> list[str]:
    """The documents in texts, separated by `<|endoftext|>`; empty ones are left out."""
    return [part for text in texts for part in text.split(DOCUMENT_MARK) if part.strip()]


def _document(lines: list[str]) -> Iterator[dict[str, str]]:
    if text := "".join(lines).strip():
        yield {"text": text}


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
