"""What libraries may say while a command runs: set before they are imported, and taken back when the command ends."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment variables of every command, where the user has not set them."""
QUIET = {
    **dict.fromkeys(("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"), "error"),
    **dict.fromkeys(("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1"),
}
"""Environment variables of `--quiet`, whatever the user has set."""
NOT_LIVE = dict.fromkeys(("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
"""The same where standard error is no terminal: these bars can only be redrawn."""
LOUD = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that report, at every start, kernels that are missing here and calls of other libraries that will change."""
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Whether a `subdued(quiet=True)` is in force."""
    return _QUIET.get()


@contextmanager
def subdued(quiet: bool) -> Iterator[None]:
    """Libraries without what nobody asked for; with `quiet` without progress bars, notices and warnings.

    A program that calls a command as a function goes on afterwards as it was.
    """
    levels = dict.fromkeys(LOUD, logging.ERROR) | ({"distill_llm": logging.ERROR} if quiet else {})
    before = {name: os.environ.get(name) for name in DEFAULTS | QUIET}
    heard = {name: logging.getLogger(name).level for name in levels}
    with warnings.catch_warnings() if quiet else nullcontext():
        for name, default in (DEFAULTS if sys.stderr.isatty() else DEFAULTS | NOT_LIVE).items():
            os.environ.setdefault(name, default)
        token = _QUIET.set(quiet or is_quiet())
        if quiet:
            os.environ.update(QUIET)
            warnings.simplefilter("ignore")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        try:
            yield
        finally:
            _QUIET.reset(token)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            for name, level in heard.items():
                logging.getLogger(name).setLevel(level)
