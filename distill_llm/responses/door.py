"""The door of generated responses: teacher and prompts are opened, and all is checked before any weight is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.chats import check_template_kwargs, template_faults
from distill_llm.data.files import FileFormat
from distill_llm.data.kinds.prompts import prompts as prompts_task
from distill_llm.data.special_tokens import check_tokenizer, tokenizer_fingerprint
from distill_llm.models.finding import OpenModel, check_head, chosen_dtype, open_model
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.models.limits import RowFacts, limits_of, read_rows, room_faults, row_faults
from distill_llm.responses.prompts import Prompt, Source, encode_prompts, read_contents
from distill_llm.responses.settings import ResponseSettings


@dataclass(frozen=True)
class OpenPrompts:
    """What was opened and read for responses.

    Attributes:
        teacher: with config and tokenizer.
        dtype: of its weights.
        read: rows that the prompts were read from.
        prompts: the different ones, encoded.
        fingerprints: of teacher, tokenizer (with its chat template where there are chats) and data.
    """

    teacher: OpenModel
    dtype: str
    read: int
    prompts: list[Prompt]
    fingerprints: dict[str, str]


def open_prompts(
    teacher: str | PreTrainedModel,
    prompts: Source,
    settings: ResponseSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    served: str | None = None,
) -> OpenPrompts:
    """Open teacher and prompts, and check that the one can answer the other.

    Args:
        teacher, prompts, settings, tokenizer: as of `respond`.
        device: where the teacher will answer.
        served: what a server calls the model that answers, with this teacher's tokenizer; None: the teacher answers itself.

    Raises:
        InputError: one line that names the argument.
    """
    opened = _opened(teacher, tokenizer, settings.trust_remote_code)
    dtype = _dtype(teacher, settings.dtype, device)
    form = FileFormat(settings.separator, settings.encoding)
    contents = read_contents(prompts, settings.prompt_column, settings.max_prompts, form)
    are_chats = settings.chat or not isinstance(contents[0], str)
    check_tokenizer(prompts_task(("messages",) if are_chats else ("prompt", "response")), opened.tokenizer, "teacher")
    given = settings.chat_template_kwargs
    raise_all(template_faults(given, are_chats, "chat_template_kwargs"))
    check_template_kwargs(given or {}, opened.tokenizer, "chat_template_kwargs")
    encoded = encode_prompts(contents, opened.tokenizer, settings.chat, given)
    longest = max(len(prompt.ids) for prompt in encoded)
    limits = limits_of(opened.config, opened.name)
    raise_all(room_faults(limits, longest, settings.max_new_tokens, "max_new_tokens", "data"))
    beyond = read_rows([{"input_ids": prompt.ids} for prompt in encoded], limits).beyond
    if beyond is not None:
        facts = RowFacts(beyond=(encoded[beyond[0]].row, beyond[1]))
        raise_all(row_faults(limits, facts, "data", opened.tokenizer))
    template = [str(opened.tokenizer.chat_template)] if are_chats else []
    fingerprints = {
        "teacher": _teacher_fingerprint(teacher, opened) if served is None else f"served:{served}",
        "tokenizer": _digest([tokenizer_fingerprint(opened.tokenizer), *template]),
        "data": _digest(prompt.key.hex() for prompt in encoded),
    }
    return OpenPrompts(opened, dtype, len(contents), encoded, fingerprints)


def _opened(
    teacher: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> OpenModel:
    """The teacher without its weights, if it can answer prompts."""
    if isinstance(teacher, str):
        if tokenizer is not None:
            fix = "leave it out: a teacher that is given by name has its own"
            raise InputError("tokenizer", type(tokenizer).__name__, fix=fix)
        opened = open_model("teacher", teacher, True, trust_remote_code)
        check_head(opened, prompts_task())
        return opened
    if tokenizer is None:
        raise InputError("tokenizer", None, "the teacher's tokenizer, because the teacher is given as a model")
    if teacher.config.is_encoder_decoder or not teacher.can_generate():
        raise InputError("teacher", type(teacher).__name__, "a causal LM, which can generate")
    name = str(teacher.config.name_or_path) or type(teacher).__name__
    return OpenModel("teacher", name, "", teacher.config, tokenizer)


def _dtype(teacher: str | PreTrainedModel, given: str | None, device: torch.device) -> str:
    chosen = chosen_dtype(given, device)
    if isinstance(teacher, str):
        return chosen
    own = str(teacher.dtype).removeprefix("torch.")
    if given not in (None, own):
        raise InputError("dtype", given, f"{own}, the dtype of the teacher that is given as a model")
    return own


def _teacher_fingerprint(teacher: str | PreTrainedModel, opened: OpenModel) -> str:
    if isinstance(teacher, PreTrainedModel):
        return teacher_fingerprint(teacher)
    if Path(opened.path).is_dir():
        return teacher_fingerprint(opened.path)
    return f"hub:{opened.path}@{getattr(opened.config, '_commit_hash', None)}"


def _digest(parts: Iterable[str]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
