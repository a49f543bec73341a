"""A teacher answers prompts, and the answers become training data.

Prompts, longest first, are cut into batches and batches into shards before the teacher runs. What a batch holds thus
depends neither on the number of processes nor on how often the work was begun, and random numbers belong to a prompt and
the number of its sample (`Draw`): greedy or drawn, the responses of an interrupted run are those of one without a break on
the same kind of device. Other batches change only the rounding of logits.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.common.processes import open_processes
from distill_llm.common.progress import progress_bar
from distill_llm.data.causal import CausalCollator
from distill_llm.data.chats import check_template_kwargs
from distill_llm.data.kinds.prompts import prompts as prompts_task
from distill_llm.data.special_tokens import check_tokenizer
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import OpenModel, check_head, chosen_dtype, open_model
from distill_llm.models.fingerprints import teacher_fingerprint, tokenizer_fingerprint
from distill_llm.models.limits import limits_of
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.folder import Counts, ResponseFolder, kept_rows
from distill_llm.responses.prompts import Prompt, Source, encode_prompts, read_contents
from distill_llm.responses.sampling import Sampling
from distill_llm.responses.work import Work


def respond(
    teacher: str | PreTrainedModel,
    prompts: Source,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    prompt_column: str | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompts: int | None = None,
    dtype: str | None = None,
    keep_truncated: bool = False,
    progress: bool = True,
) -> Counts:
    """Answer prompts and write the answers as data of the task `prompts` (Kim and Rush, 2016, section 3.2).

    The same call goes on where an earlier one was stopped. In several processes (`accelerate launch`) each answers its share,
    and all return when all is done. A repeated prompt is answered once; a repeated response to a prompt is left out.

    Args:
        teacher: folder, Hub id or `package://` path of a causal LM, pruned or not; or the model itself, on its device.
        prompts: file, folder or Hub id with a column of texts or of chats; a data set; a list of texts or chats. Of a chat, a
            last turn of the assistant is left out.
        output_dir: new, empty, or of an earlier call; see `distill_llm.responses.folder`.
        tokenizer: of a teacher given as model.
        max_new_tokens, temperature, top_p, top_k, samples, seed: see `Sampling`.
        batch_size: responses at once.
        prompt_column: by default `prompt`, else `messages`.
        chat: ask texts in the words of the chat template; rows are then chats.
        chat_template_kwargs: what the template is given beside the chats, such as `enable_thinking`.
        max_prompts: only the first rows.
        dtype: of a teacher given by name: float32, bfloat16 or float16; by default bfloat16 on CUDA, else float32.
        keep_truncated: keep responses that reached `max_new_tokens`; may be changed later without generating again.
        progress: show a line on the work ahead and a bar.

    Returns:
        The counts, as in `responses.json`.

    Raises:
        InputError: one line that names the argument, before the teacher's weights are loaded; or afterwards, where
            no response is left.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, samples, seed)
    for name, number in (("batch_size", batch_size), ("max_prompts", max_prompts)):
        if number is not None and number < 1:
            raise InputError(name, number, "a whole number of at least 1")
    opened = _opened(teacher, tokenizer)
    processes = open_processes()
    dtype = _dtype(teacher, dtype, processes.device)
    contents = read_contents(prompts, prompt_column, max_prompts)
    is_chat = chat or not isinstance(contents[0], str)
    check_tokenizer(prompts_task(("messages",) if is_chat else ("prompt", "response")), opened.tokenizer, "teacher")
    if chat_template_kwargs:
        if not is_chat:
            raise InputError("chat_template_kwargs", dict(chat_template_kwargs), "nothing for texts without chat")
        check_template_kwargs(chat_template_kwargs, opened.tokenizer, "chat_template_kwargs")
    encoded = encode_prompts(contents, opened.tokenizer, chat, chat_template_kwargs)
    _check_lengths(encoded, opened, max_new_tokens)

    work = Work(encoded, samples, batch_size, max_new_tokens, seed)
    settings = {**asdict(sampling), "batch_size": batch_size, "prompt_column": prompt_column, "chat": chat}
    settings["chat_template_kwargs"] = dict(chat_template_kwargs) if chat_template_kwargs else None
    settings |= {"max_prompts": max_prompts, "dtype": dtype, "shard_responses": work.shard_responses}
    template = [str(opened.tokenizer.chat_template)] if is_chat else []
    fingerprints = {
        "teacher": _teacher_fingerprint(teacher, opened),
        "tokenizer": _digest([tokenizer_fingerprint(opened.tokenizer), *template]),
        "data": _digest(prompt.key.hex() for prompt in encoded),
    }
    folder = ResponseFolder(Path(output_dir), settings, fingerprints)
    names = {"teacher": opened.name, "data": prompts if isinstance(prompts, str) else type(prompts).__name__}
    environment = _environment(processes.device)
    processes.wait_for_everyone()
    if processes.is_main_process:
        folder.write_about(names, environment)
    missing = [number for number in work.shards if not folder.has_shard(number)]
    processes.wait_for_everyone()  # from here on others write shards
    shown = progress and processes.is_main_process
    if missing and shown:
        tqdm.write(work.announcement(missing))
    if own := missing[processes.process_index :: processes.num_processes]:
        if isinstance(teacher, str):
            teacher = load_pretrained(opened.path, dtype=getattr(torch, dtype))
            teacher.to(processes.device)  # type: ignore[arg-type]
        _generate(work, own, Decoder(teacher, CausalCollator(opened.tokenizer), sampling, "teacher"), folder, shown)
    processes.wait_for_everyone()

    kept, counts = kept_rows(work.by_prompt(folder), len(contents), keep_truncated)
    if not kept:
        accepted = "more: every response was cut off there (keep_truncated keeps them, without generating again)"
        raise InputError("max_new_tokens", max_new_tokens, accepted)
    if processes.is_main_process:
        folder.write_kept(kept)
        folder.write_about(names, environment, counts, keep_truncated)
    processes.wait_for_everyone()
    return counts


def _generate(work: Work, shards: Sequence[int], decoder: Decoder, folder: ResponseFolder, progress: bool) -> None:
    """Write shards, one after the other."""
    tokens, start = 0, time.monotonic()
    total = sum(len(work.shard(number)) for number in shards)
    with decoder.ready(), progress_bar(total=total, desc="Responding", unit=" responses", shown=progress) as bar:
        for number in shards:
            rows = []
            for batch in work.batches(number):
                keys = [work.key(*each) for each in batch]
                answers = decoder([work.prompts[place].ids for place, _ in batch], decoder.sampling.uniforms(keys))
                rows += [
                    work.row(*each, decoder.text(answer), len(answer), decoder.ended(answer))
                    for each, answer in zip(batch, answers, strict=True)
                ]
                tokens += sum(map(len, answers))
                bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            folder.write_shard(number, rows)


def _opened(teacher: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> OpenModel:
    """The teacher without its weights, if it can answer prompts."""
    if isinstance(teacher, str):
        if tokenizer is not None:
            raise InputError(
                "tokenizer", type(tokenizer).__name__, "None: it lies with a teacher that is given by name"
            )
        opened = open_model("teacher", teacher)
        check_head(opened, prompts_task())
        return opened
    if tokenizer is None:
        raise InputError("tokenizer", None, "the tokenizer of the teacher, which is given as model")
    if teacher.config.is_encoder_decoder or not teacher.can_generate():
        raise InputError("teacher", type(teacher).__name__, "a causal LM, which can generate")
    return OpenModel("teacher", str(teacher.config.name_or_path), "", teacher.config, tokenizer)


def _dtype(teacher: str | PreTrainedModel, given: str | None, device: torch.device) -> str:
    chosen = chosen_dtype(given, device)
    if isinstance(teacher, str):
        return chosen
    own = str(teacher.dtype).removeprefix("torch.")
    if given not in (None, own):
        raise InputError("dtype", given, f"{own}, the dtype of the teacher that is given as model")
    return own


def _check_lengths(prompts: Sequence[Prompt], opened: OpenModel, max_new_tokens: int) -> None:
    """Whether every prompt leaves room for a response."""
    bound = limits_of(opened.config, opened.name).longest
    longest = max(len(prompt.ids) for prompt in prompts)
    if bound is None or longest + max_new_tokens <= bound:
        return
    if max_new_tokens >= bound:
        raise InputError("max_new_tokens", max_new_tokens, f"less than {bound}, the longest input of {opened.name}")
    room = bound - max_new_tokens
    count = sum(len(prompt.ids) > room for prompt in prompts)
    given = f"a prompt of {longest} tokens ({count} of {len(prompts)} prompts have more than {room})"
    raise InputError("data", given, f"at most {room}: {opened.name} takes {bound}, less {max_new_tokens} new ones")


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


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"distill_llm": distill_llm.__version__, **versions, "device": name}
