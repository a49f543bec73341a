"""Messages are one line that a terminal can show."""

import pytest

from distill_llm.common.errors import InputError, InputErrors, one_of


@pytest.mark.parametrize("long", ["field", "given", "accepted", "fix"])
def test_no_message_is_longer_than_a_few_lines_of_a_terminal_or_has_a_line_end(long):
    parts = {"field": "data.path", "given": "x", "accepted": "y", "fix": ""} | {long: f"begin\n{'z' * 10_000}\nend"}
    text = str(InputError(parts["field"], parts["given"], parts["accepted"], fix=parts["fix"]))
    assert len(text) <= 300 and "\n" not in text and "begin" in text
    assert all(len(line) <= 300 for line in str(InputErrors([InputError("a", "b" * 999, "c" * 999)] * 3)).split("\n"))


def test_the_end_of_a_path_stays_and_so_does_what_to_do():
    text = str(InputError("data.path", "/home/" + "folder/" * 100 + "rows.csv", fix="remove it: " + "w" * 150))
    assert "'/home/folder/" in text and "rows.csv';" in text and text.endswith("remove it: " + "w" * 150)


def test_a_short_message_stays_as_it_is():
    assert str(InputError("a.b", "given  text", "a number")) == "a.b: got 'given  text'; accepted: a number"


def test_of_many_names_the_first_and_the_nearest_are_named():
    names = [f"family-{number}" for number in range(500)]
    assert one_of(names[:3]) == "one of family-0, family-1, family-2"
    words = one_of(names, "famly-499")
    assert words.startswith("'family-499' (the nearest), or one of family-0, ") and words.endswith("(500 in all)")
    assert len(words) < 180
