"""One door to all data: a task's name and a path in, rows in splits out."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig

from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.data.decoders import is_decoder, packing_faults
from distill_llm.data.embedded import TASK as EMBEDDED
from distill_llm.data.embedded import load_embedded
from distill_llm.data.glue import load_glue
from distill_llm.data.labelled import load_labelled, load_text
from distill_llm.data.prompts import CHAT, load_prompts
from distill_llm.data.sources import Splits, resolve_path
from distill_llm.data.tasks import GLUE, Task, TaskData, label_names, prompts
from distill_llm.metrics.registry import PROMPT_METRICS

NAMED_COLUMNS = ("classification", "regression", "text", "prompts")
TASKS = (*GLUE, "embedded", *NAMED_COLUMNS)


def load_task(
    task: str,
    path: str | None = None,
    *,
    config: PreTrainedConfig | None = None,
    columns: Mapping[str, str] | None = None,
    train_examples: int | None = None,
    holdout_examples: int = 0,
    seed: int = 0,
    metric: str | None = None,
    max_new_tokens: int = 64,
    join_rows: bool = False,
    packing: bool = False,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    training: bool = True,
) -> TaskData:
    """The rows of a task, in the splits that training, choosing and reporting use.

    Args:
        task: a GLUE name; `embedded` (tweets of the quickstart extra); `classification` or `regression` (any labelled
            data); `text` (language modelling: causal for a decoder, else masked); `prompts` (responses to prompts, for a
            decoder).
        path: a folder in the official GLUE TSV layout, a file (csv, tsv, json, jsonl, parquet, txt), a folder of such
            files (`train.*`, `validation.*`, `test.*`), a Hub id (a configuration after a colon), or
            `package://PKG/PATH`. None for `embedded`, and for GLUE to take the Hub's copy.
        config: of the model that the rows are for; None is an encoder's.
        columns: the data's names of `text`, `text_pair` and `label`; for prompts, of `prompt` and `response`, or of
            `messages`.
        train_examples: how many training rows to keep, drawn with `seed`; None for all.
        holdout_examples: how many training rows become `validation`, drawn with `seed` and removed from `train`. Where
            the data bring their own validation split, how many of its rows to use (0 for all).
        seed: of the draws. The rows that `validation` gets do not depend on `train_examples`.
        metric: for prompts, one of PROMPT_METRICS, or a metric of `evaluate` for texts (`rouge:rougeL`); None is perplexity.
        max_new_tokens: for prompts with a metric of generated text.
        join_rows: for text, whether rows are lines of longer documents.
        packing: for prompts, whether short training sequences share rows.
        chat: for prompts, whether to make chats of them, in the words of the tokenizer's chat template.
        chat_template_kwargs: for chats, what the template is given beside them, such as `enable_thinking`.
        training: False where a model is scored and nothing else: `train` is then `test` over again, and data need no
            training rows.

    Raises:
        InputError: an unknown task, missing data, file or column, a label that does not fit, more rows asked for than
            there are, or a model or setting that the task does not go with.
    """
    if task not in TASKS:
        raise InputError("data.task", task, one_of(TASKS, task))
    if columns and task not in NAMED_COLUMNS:
        raise InputError(
            "data.columns", dict(columns), f"nothing for {task} (only {', '.join(NAMED_COLUMNS)} take columns)"
        )
    _check_prompts(task, config, metric, {"packing": packing, "chat": chat})
    if join_rows and task != "text":
        raise InputError("data.join_rows", join_rows, f"false for {task}: only rows of text are joined")
    if path is not None:
        path = resolve_path(path, "data.path")
    if task == "prompts":
        from distill_llm.metrics.registry import prefers_higher

        metric = metric or PROMPT_METRICS[0]
        higher = metric in PROMPT_METRICS or prefers_higher(metric)
        names, splits = load_prompts(_needed(task, path), columns, training, chat)
        spec = prompts(names, metric, max_new_tokens, packing, chat_template_kwargs, higher)
    else:
        spec, splits = _load(task, path, columns, config, training, join_rows)
    if chat_template_kwargs and spec.text_columns != CHAT:
        accepted = "nothing where data are no chats (chat: true makes chats of prompts)"
        raise InputError("data.chat_template_kwargs", dict(chat_template_kwargs), accepted)
    if not training:
        return TaskData(spec, splits["test"], None, splits["test"])
    train, validation = _hold_out(splits, holdout_examples, seed)
    if train_examples is not None:
        if not 1 <= train_examples <= len(train):
            raise InputError("data.train_examples", train_examples, f"1 to {len(train)} (the training rows there are)")
        train = train.shuffle(seed=seed).select(range(train_examples))
    return TaskData(spec, train, validation, splits["test"])


def _check_prompts(
    task: str, config: PreTrainedConfig | None, metric: str | None, settings: Mapping[str, bool]
) -> None:
    if task != "prompts":
        if metric is not None:
            raise InputError("evaluation.metric", metric, f"nothing for {task}, whose metrics are its own")
        for name, value in settings.items():
            if value:
                raise InputError(f"data.{name}", value, f"false for {task}: only rows of prompts take it")
        return
    if config is None:
        return
    if not is_decoder(config):
        accepted = f"a task for encoders, such as text or classification: a {config.model_type} answers no prompts"
        raise InputError("data.task", task, accepted)
    if settings["packing"]:
        raise_all(packing_faults(config.model_type, "data.packing", given=True))


def _load(
    task: str,
    path: str | None,
    columns: Mapping[str, str] | None,
    config: PreTrainedConfig | None,
    training: bool,
    join_rows: bool,
) -> tuple[Task, Splits]:
    if task in GLUE:
        return GLUE[task], load_glue(task, path, training)
    if task == "embedded":
        if path is not None:
            raise InputError("data.path", path, "no path for 'embedded' (its data are in the quickstart extra)")
        return EMBEDDED, load_embedded()
    path = _needed(task, path)
    if task == "text":
        return load_text(path, columns, config is not None and is_decoder(config), training, join_rows)
    known = (label_names(config) or tuple(map(str, range(config.num_labels or 0)))) if config is not None else None
    return load_labelled(task, path, columns, training, known)


def _needed(task: str, path: str | None) -> str:
    if path is None:
        raise InputError("data.path", None, f"a file, a folder or a Hub id, which {task!r} needs")
    return path


def _hold_out(splits: Splits, examples: int, seed: int) -> tuple[Dataset, Dataset | None]:
    train, own = splits["train"], splits.get("validation")
    available = len(own) if own is not None else len(train) - 1
    if not 0 <= examples <= available:
        raise InputError("data.holdout_examples", examples, f"0 to {available}")
    if own is not None:
        return train, own.select(range(examples)) if examples else own
    if not examples:
        return train, None
    drawn = train.shuffle(seed=seed)
    return drawn.select(range(examples, len(drawn))), drawn.select(range(examples))
