"""Where rows come from: `package://` paths, files, folders of split files, and data sets on the Hub."""

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from distill_llm.common.errors import InputError
from distill_llm.common.hub import check_hub_name
from distill_llm.data.files import (
    DOCUMENT_MARK,
    READERS,
    FileFormat,
    check_format,
    kind_of,
    one_line,
    read_files,
    stem_of,
)
from distill_llm.data.splitting import Splits

PACKAGE = "package://"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "dev", "val", "valid", "eval"),
    "test": ("test",),
}


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


def read_splits(
    path: str,
    config: str | None = None,
    field: str = "data.path",
    training: bool = True,
    form: FileFormat = FileFormat(),  # noqa: B008 - frozen
) -> Splits:
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
        form: how files are written.

    Raises:
        InputError: nothing is there, or it cannot be read, or the rows that are needed are missing.
    """
    name, _, given = path.partition(":")
    here = Path(path)
    if os.path.isfile(path):  # unlike that of pathlib, also for a name that no file can have
        return {"train": read_files([here], field, form)}
    if is_saved(here):
        check_format(form, None)
        splits = _load(lambda: _saved(path), path, field)
    elif os.path.isdir(path) and (files := _split_files(here)):
        splits = {split: read_files(found, field, form) for split, found in files.items()}
    else:
        check_format(form, None)
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
        if os.path.isdir(path) and not is_saved(Path(path)):
            accepted = f"a folder with files train.*, validation.* or test.* ({', '.join(READERS)}), or texts (.txt)"
            raise InputError(field, path, accepted) from error
        accepted = f"an existing file or folder, or the id of a data set on the Hub ({one_line(error)})"
        raise InputError(field, path, accepted) from error
    if isinstance(loaded, Dataset):
        return {"train": loaded}
    known = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in (*aliases, f"{aliases[0]}_matched")}
    known["validation_mismatched"] = "mismatched"  # MNLI's second one
    return {known[split]: rows for split, rows in loaded.items() if split in known}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    readable = sorted(file for file in folder.iterdir() if kind_of(file) in READERS)
    found: dict[str, list[Path]] = {}
    for split, aliases in SPLIT_NAMES.items():
        if files := [file for file in readable if stem_of(file) in aliases]:
            found[split] = files
    texts = [file for file in readable if kind_of(file) == ".txt"]
    return found or ({"train": texts} if texts else {})


def split_documents(texts: Iterable[str]) -> list[str]:
    """The documents in texts, separated by `<|endoftext|>`; empty ones are left out."""
    return [part for text in texts for part in text.split(DOCUMENT_MARK) if part.strip()]
