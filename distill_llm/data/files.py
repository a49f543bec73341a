"""Rows in files: tables, JSON and plain text, compressed or not, with their separator and encoding."""

import codecs
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, load_dataset
from pyarrow import ArrowInvalid

from distill_llm.common.errors import InputError

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz")
SEPARATORS = (",", ";", "\t", "|")
BYTE_ORDER_MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 65536
"""Characters in which the header line of a table is looked for."""
DOCUMENT_MARK = "<|endoftext|>"
LONGEST_DOCUMENT = 100_000


@dataclass(frozen=True)
class FileFormat:
    """How files are written, where the user says so.

    Attributes:
        separator: between the columns of a .csv or .tsv file; None: a tab in .tsv, in .csv the one of `, ; tab |` that the
            header line has most of.
        encoding: of text; None: what the byte order mark says, else UTF-8.
    """

    separator: str | None = None
    encoding: str | None = None

    def unused(self, kind: str) -> str | None:
        """The name of a setting that a kind of file (or None: no file) has no use for."""
        if self.separator is not None and READERS.get(kind) != "csv":
            return "separator"
        return "encoding" if self.encoding is not None and READERS.get(kind, "parquet") == "parquet" else None


def kind_of(file: Path) -> str:
    """The ending that says how a file is read, in small letters: `.csv` of `a.CSV` and of `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else "".join(suffixes[-1:])


def stem_of(file: Path) -> str:
    """A file's name in small letters without the endings that `kind_of` reads."""
    return (Path(file.stem) if file.suffix.lower() in COMPRESSED else file).stem.lower()


def read_files(files: list[Path], field: str, form: FileFormat) -> Dataset:
    """The rows of files of one kind, one after another.

    Args:
        field: the setting that names the files, for messages.
        form: how they are written.

    Raises:
        InputError: files of several kinds or of an unknown one, a malformed file, a wrong encoding, a setting that they have
            no use for.
    """
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 or not kinds <= set(READERS):
        accepted = f"files of one kind out of {', '.join(READERS)} (compressed: {', '.join(COMPRESSED)})"
        raise InputError(field, ", ".join(map(str, files)), accepted)
    kind, names = kinds.pop(), [str(file) for file in files]
    check_format(form, kind)
    try:
        encoding = form.encoding or _marked(files[0])
        if kind == ".txt":
            stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            given = {"files": names, "stamps": stamps, "encoding": encoding}
            return Dataset.from_generator(read_documents, gen_kwargs=given, split="train")
        options: dict[str, Any] = {} if kind == ".parquet" or encoding is None else {"encoding": encoding}
        if READERS[kind] == "csv":
            separator = form.separator or ("\t" if kind == ".tsv" else separator_of(files[0], encoding))
            options |= {"keep_default_na": False, "sep": separator, "quoting": 3 if kind == ".tsv" else 0}
        rows = load_dataset(READERS[kind], data_files=names, split="train", **options)
        if READERS[kind] == "json":
            _check_utf_8(rows)
        return rows
    except Exception as error:  # pyarrow, pandas and `datasets` raise many kinds
        if (wrong := _wrong_bytes(error)) is not None:
            raise _encoding_fault(wrong, names) from error
        if "corresponds to no data" in str(error):  # `datasets` found a header line, or less
            raise InputError(field, ", ".join(names), "a file with rows: it has none") from error
        raise InputError(field, ", ".join(names), f"a well-formed {kind} file ({one_line(error)})") from error


def check_format(form: FileFormat, kind: str | None) -> None:
    """Raise InputError where a setting is given that this kind of file (None: no file at all) has no use for."""
    if form.encoding is not None:
        try:
            codecs.lookup(form.encoding)
        except LookupError:
            accepted = "an encoding that Python knows: utf-8, utf-16, cp1252, latin-1, ..."
            raise InputError("data.encoding", form.encoding, accepted) from None
    if form.separator is not None and len(form.separator) != 1:
        raise InputError("data.separator", form.separator, 'one character (a tab is "\\t", in double quotes)')
    if (name := form.unused(kind or "")) is not None:
        holders = ".csv and .tsv files" if name == "separator" else "files of text"
        fix = f"leave it out: only {holders} have one"
        raise InputError(f"data.{name}", getattr(form, name), fix=fix)


def separator_of(file: Path, encoding: str | None) -> str:
    """The separator that gives a table's header line the most columns; the earlier of SEPARATORS where two give as many."""
    with fsspec.open(str(file), "rt", encoding=encoding or "utf-8", compression="infer", newline="") as lines:
        head = lines.read(HEAD)
    try:
        columns = {each: len(next(csv.reader(StringIO(head), delimiter=each), [])) for each in SEPARATORS}
    except csv.Error:
        return SEPARATORS[0]
    return max(SEPARATORS, key=columns.__getitem__)


def _marked(file: Path) -> str | None:
    """The encoding that a byte order mark names; None without one."""
    with fsspec.open(str(file), "rb", compression="infer") as binary:
        begin = binary.read(4)
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if begin.startswith(mark)), None)


def _check_utf_8(rows: Dataset) -> None:
    """Raise UnicodeError where a text is not UTF-8: the reader of JSON does not look."""
    try:
        rows.data.validate(full=True)
    except ArrowInvalid as error:
        raise UnicodeError(str(error)) from error


def _wrong_bytes(error: BaseException | None) -> UnicodeError | None:
    """The error of decoding that is behind an error, if one is."""
    while error is not None:
        if isinstance(error, UnicodeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _encoding_fault(error: UnicodeError, names: list[str]) -> InputError:
    """What to do about bytes that are not what the encoding says."""
    used = str(getattr(error, "encoding", "utf-8"))
    fix = f"set it to the encoding of {names[0]}, for example cp1252 or utf-16: it has bytes that are not {used}"
    return InputError("data.encoding", used, fix=fix)


def read_documents(
    files: list[str], stamps: list[tuple[int, int]], encoding: str | None = None
) -> Iterator[dict[str, str]]:
    """Documents of plain text files, as rows with a `text` column.

    Documents end at `<|endoftext|>`, at a blank line, or at the first line end after 100,000 characters.

    Args:
        files: the paths.
        stamps: size and time of change of each file; `datasets` keys its cache by the arguments.
        encoding: None for UTF-8, where a wrong byte becomes U+FFFD.
    """
    for file in files:
        kept: list[str] = []
        length = 0  # of what is kept
        errors = "replace" if encoding is None else "strict"
        with fsspec.open(file, "rt", encoding=encoding or "utf-8", errors=errors, compression="infer") as lines:
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


def _document(lines: list[str]) -> Iterator[dict[str, str]]:
    if text := "".join(lines).strip():
        yield {"text": text}


def one_line(error: BaseException) -> str:
    """The text of what caused an error in the first place, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
