"""The task and the columns of a user's own rows, found from what the rows hold. What is not clear is asked for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from distill_llm.common.errors import InputError
from distill_llm.data.chats import is_chat
from distill_llm.data.labelled import TEXTS, content_of
from distill_llm.drafting.model import ModelFacts

TEXT = ("text", "sentence", "review", "content", "body", "tweet", "comment", "message", "document")
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
)
LABEL = (
    *("label", "labels", "target", "class", "category", "topic", "sentiment", "emotion", "intent"),
    *("score", "rating", "stars", "grade", "similarity"),
)
PROMPT = ("prompt", "instruction", "question", "query", "input")
RESPONSE = ("response", "completion", "answer", "output", "chosen")
MOST_CLASSES = 50
"""Most different values of a column that can be taken for classes unasked."""
LOOKED_AT = 2000
"""Rows that are looked at, evenly spread."""


@dataclass(frozen=True)
class Rows:
    """The task of some rows.

    Attributes:
        task: as `data.task`.
        columns: our name of a column -> the data's.
        chat: whether prompts go into the model's chat template.
        said: a line for each thing that was guessed.
    """

    task: str
    columns: Mapping[str, str]
    chat: bool = False
    said: tuple[str, ...] = ()


def task_of(rows: Dataset, model: ModelFacts, task: str | None, columns: Mapping[str, str]) -> Rows:
    """The task and the columns of rows for a model.

    Args:
        task: what the user says; None: it is guessed.
        columns: our name -> the data's, as far as the user says so.

    Raises:
        InputError: naming the option that says what cannot be guessed safely.
    """
    seen = _Seen(rows)
    for name, column in columns.items():
        if column not in rows.column_names:
            raise InputError(_option(name), column, f"one of {', '.join(rows.column_names)}")
    if task in ("text", "prompts") or (task is None and model.writes):
        return _for_writers(seen, model, task, columns)
    if task is None and model.masked and not ("label" in columns or seen.named(LABEL)):
        return _documents(seen, columns, "the model predicts hidden words and no column looks like a label")
    return _labelled(seen, model, task, columns)


def _option(name: str) -> str:
    """The option that names a column."""
    return name if name in ("text", "label") else "columns"


class _Seen:
    """Some rows, evenly spread over all, and what their columns hold."""

    def __init__(self, rows: Dataset):
        step = max(1, len(rows) // LOOKED_AT)
        self.rows = rows.select(range(0, len(rows), step))
        self.texts = [name for name in rows.column_names if content_of(rows, name) == TEXTS]
        first = self.rows[0] if len(self.rows) else {}
        self.chats = [name for name in rows.column_names if is_chat(first.get(name))]

    def named(self, names: Sequence[str], among: Collection[str] | None = None) -> list[str]:
        """The columns with one of these names, the better names first."""
        found = {column.strip().lower(): column for column in (self.rows.column_names if among is None else among)}
        return [found[name] for name in names if name in found]

    def values(self, column: str) -> list[Any]:
        """The different values of a column, without gaps."""
        return [value for value in dict.fromkeys(self.rows[column][:]) if value is not None and value != ""]

    def is_class(self, column: str) -> bool:
        """Whether a column may hold classes: few values, each several times."""
        if isinstance(self.rows.features[column], ClassLabel):
            return True
        kind = content_of(self.rows, column)
        if kind not in (TEXTS, "bool values") and not kind.startswith(("int", "uint", "float")):
            return False
        return 2 <= len(self.values(column)) <= min(MOST_CLASSES, max(2, len(self.rows) // 4))

    def is_number(self, column: str) -> bool:
        """Whether a column holds numbers."""
        return content_of(self.rows, column).startswith(("int", "uint", "float", "double"))


def _for_writers(seen: _Seen, model: ModelFacts, task: str | None, columns: Mapping[str, str]) -> Rows:
    """Chats, prompts with responses, or plain text, for a model that writes text."""
    if task != "text":
        if "messages" in columns or ("prompt" not in columns and "response" not in columns and len(seen.chats) == 1):
            column = columns.get("messages") or seen.chats[0]
            return Rows("prompts", {"messages": column}, said=(f"task: prompts; the column {column!r} holds chats",))
        prompts, responses = seen.named(PROMPT, seen.texts), seen.named(RESPONSE, seen.texts)
        if task == "prompts" or "prompt" in columns or "response" in columns or (prompts and responses):
            return _prompts(seen, model, columns, prompts, responses)
        if "text" not in columns and (labels := seen.named(LABEL)):
            fix = f"say text, to train on the texts alone: the model writes text, and {labels[0]!r} looks like a label"
            raise InputError("task", None, fix=fix)
    return _documents(seen, columns, "the model writes text" if task is None else "")


def _prompts(
    seen: _Seen, model: ModelFacts, columns: Mapping[str, str], prompts: list[str], responses: list[str]
) -> Rows:
    prompt = columns.get("prompt") or _only("columns", "prompt", prompts, seen.texts)
    response = columns.get("response") or _only("columns", "response", responses, seen.texts)
    said = f"task: prompts; prompt is {prompt!r}, response is {response!r}"
    chat = "in the model's chat template" if model.chats else "as plain text: the model has no chat template"
    return Rows("prompts", {"prompt": prompt, "response": response}, model.chats, (f"{said}, {chat}",))


def _documents(seen: _Seen, columns: Mapping[str, str], why: str) -> Rows:
    column = columns.get("text") or _text(seen, seen.texts)
    said = f"task: text, the column {column!r}" + (f" ({why})" if why else "")
    return Rows("text", {"text": column}, said=(said,))


def _labelled(seen: _Seen, model: ModelFacts, task: str | None, columns: Mapping[str, str]) -> Rows:
    """One or two texts, and a class or a number."""
    taken = [column for name, column in columns.items() if name != "label"]
    label = columns.get("label") or _label(seen, task or model.task, taken)
    kind, why = (task, "") if task else _kind(seen, model, label)
    texts = [column for column in seen.texts if column != label]
    found = {"text": columns["text"]} if "text" in columns else {}
    if "text_pair" in columns:
        found["text_pair"] = columns["text_pair"]
    pair = [both for names in PAIRS if len(both := seen.named(names, texts)) == 2]
    if not found and len(pair) == 1:
        found = {"text": pair[0][0], "text_pair": pair[0][1]}
    elif "text" not in found:
        found = {"text": _text(seen, [each for each in texts if each not in found.values()]), **found}
    said = [f"text: {' and '.join(repr(column) for column in found.values())}; label: {label!r}"]
    return Rows(kind, {**found, "label": label}, said=(f"task: {kind}{why}", *said))


def _label(seen: _Seen, task: str | None, taken: Collection[str]) -> str:
    rest = [column for column in seen.rows.column_names if column not in taken]
    fits = seen.is_number if task == "regression" else seen.is_class
    named = [column for column in seen.named(LABEL, rest) if task != "regression" or fits(column)]
    if (exact := seen.named(("label", "labels"), named)) and len(exact) == 1:
        return exact[0]
    found = named or [column for column in rest if fits(column)]
    return _only("label", "label", found, rest)


def _text(seen: _Seen, texts: list[str]) -> str:
    return _only("text", "text", seen.named(TEXT, texts) or texts, texts)


def _only(option: str, what: str, found: list[str], columns: Collection[str]) -> str:
    """The one column that was found.

    Raises:
        InputError: there are several, or none.
    """
    if len(found) == 1:
        return found[0]
    shown = ", ".join(found or columns)
    why = f"these may all be the {what}" if found else f"none of these is clearly the {what}"
    given = f"--columns {what}=COLUMN" if option == "columns" else f"--{option} COLUMN"
    raise InputError(option, shown or "no column", fix=f"say which, with {given}: {why}")


def _kind(seen: _Seen, model: ModelFacts, label: str) -> tuple[str, str]:
    """Classification or regression, and why."""
    if model.task is not None:
        return model.task, f" ({model.why})"
    values = seen.values(label)
    if len(values) < 2:
        fix = "give rows with at least two different labels, or name another column with --label COLUMN: "
        fix += (
            f"all {len(seen.rows):,} rows that were looked at have {values[0]!r}" if values else "the column is empty"
        )
        raise InputError("label", label, fix=fix)
    whole = not seen.is_number(label) or all(float(value).is_integer() for value in values)
    if seen.is_class(label) and whole:
        shown = ", ".join(map(str, sorted(values, key=str)[:4])) + (", ..." if len(values) > 4 else "")
        other = "; for numbers on a scale say --task regression" if seen.is_number(label) and len(values) > 2 else ""
        return "classification", f" (the label has {len(values)} values: {shown}{other})"
    if seen.is_number(label) and not whole:
        return "regression", " (the label holds numbers with fractions)"
    fix = f"say classification or regression: the label {label!r} has {len(values)} different values"
    raise InputError("task", None, fix=fix)
