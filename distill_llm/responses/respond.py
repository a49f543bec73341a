"""A teacher answers prompts, and the answers become training data.

Prompts, longest first, are cut into batches and batches into shards before the teacher runs. What a batch holds thus
depends neither on the number of processes nor on how often the work was begun, and random numbers belong to a prompt and
the number of its sample (`Draw`): greedy or drawn, the responses of an interrupted run are those of one without a break on
the same kind of device. Other batches change only the rounding of logits.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.files import full_disk_named
from distill_llm.common.locks import alone_in
from distill_llm.common.outputs import usable_output
from distill_llm.common.processes import open_processes
from distill_llm.common.progress import progress_bar
from distill_llm.data.causal import CausalCollator
from distill_llm.data.prompt_encoder import CUT
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.endpoint import Client, Endpoint
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.door import OpenPrompts, open_prompts
from distill_llm.responses.folder import ABOUT, Counts, ResponseFolder, Row, kept_rows
from distill_llm.responses.prompts import Source
from distill_llm.responses.sampling import Likelihood
from distill_llm.responses.served import ServedAnswers
from distill_llm.responses.settings import ResponseSettings
from distill_llm.responses.work import Work


def respond(
    teacher: str | PreTrainedModel,
    prompts: Source,
    output_dir: str | Path,
    settings: ResponseSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    server: Endpoint | None = None,
    progress: bool = True,
) -> Counts:
    """Answer prompts and write the answers as data of the task `prompts` (Kim and Rush, 2016, section 3.2).

    The same call goes on where an earlier one was stopped. In several processes (`accelerate launch`) each answers its share,
    and all return when all is done. A repeated prompt is answered once; a repeated response to a prompt is left out.

    Args:
        teacher: folder, Hub id or `package://` path of a causal LM, pruned or not; or the model itself, on its device.
        prompts: file, folder or Hub id with a column of texts or of chats; a data set; a list of texts or chats. If a chat ends
            with a turn of the assistant, that turn is left out.
        output_dir: new, empty, or of an earlier call; see `distill_llm.responses.folder`.
        settings: how prompts are read, asked and answered; None: the defaults.
        tokenizer: of a teacher given as model.
        server: where the model that answers is served; of `teacher` only the tokenizer and the config are read then. Its
            answers are kept as texts.
        progress: show a line on the work ahead and a bar.

    Returns:
        The counts, as in `responses.json`.

    Raises:
        InputError: one line that names the argument or setting, before the teacher's weights are loaded; or afterwards, where
            no response is left.
    """
    settings, processes = settings or ResponseSettings(), open_processes()
    opened = open_prompts(teacher, prompts, settings, tokenizer, processes.device, server.model if server else None)
    if server is not None:
        Client(replace(server, retries=min(1, server.retries))).check()
    folder = Path(output_dir)
    usable_output(folder, begun=ABOUT)
    names = {"teacher": opened.teacher.name, "data": prompts if isinstance(prompts, str) else type(prompts).__name__}
    with alone_in(folder), full_disk_named(folder):
        source = server or teacher
        return _respond(source, opened, folder, settings, names, progress and processes.is_main_process)


def _respond(
    teacher: str | PreTrainedModel | Endpoint,
    opened: OpenPrompts,
    output_dir: Path,
    settings: ResponseSettings,
    names: dict[str, str],
    shown: bool,
) -> Counts:
    """Answer checked prompts in a folder that nobody else is using."""
    processes = open_processes()
    work = Work(opened.prompts, settings, tokenizer_fingerprint(opened.teacher.tokenizer))
    recorded = settings.recorded(opened.dtype, work.shard_responses)
    folder = ResponseFolder(output_dir, recorded, opened.fingerprints)
    environment = _environment(processes.device)
    processes.wait_for_everyone()
    if processes.is_main_process:
        folder.write_about(names, environment)
    missing = [number for number in work.shards if not folder.has_shard(number)]
    processes.wait_for_everyone()  # from here on others write shards
    if missing and shown:
        tqdm.write(work.announcement(missing))
    own = missing[processes.process_index :: processes.num_processes]
    if own and isinstance(teacher, Endpoint):
        _ask(work, own, ServedAnswers(teacher, settings, opened.teacher.tokenizer), folder, shown)
    elif own:
        if isinstance(teacher, str):
            teacher = load_pretrained(opened.teacher.path, settings.trust_remote_code, dtype=opened.dtype)
            teacher.to(processes.device)  # type: ignore[arg-type]
        assert not isinstance(teacher, Endpoint)
        decoder = Decoder(teacher, CausalCollator(opened.teacher.tokenizer), settings, "teacher")
        _generate(work, own, decoder, folder, shown)
    processes.wait_for_everyone()

    kept, counts = kept_rows(work.by_prompt(folder), opened.read, settings.keep_truncated)
    raise_all(_cut_faults(kept, settings))
    if processes.is_main_process:
        folder.write_kept(kept)
        folder.write_about(names, environment, counts, settings.keep_truncated)
    processes.wait_for_everyone()
    return counts


def _cut_faults(kept: Sequence[Row], settings: ResponseSettings) -> list[InputError]:
    """A fault where no response was kept."""
    if kept:
        return []
    fix = "increase it: every response was cut off there (`keep_truncated` keeps them without generating again)"
    return [InputError("max_new_tokens", settings.max_new_tokens, fix=fix)]


def _generate(work: Work, shards: Sequence[int], decoder: Decoder, folder: ResponseFolder, progress: bool) -> None:
    """Write shards, one after the other."""
    tokens, start = 0, time.monotonic()
    total = sum(len(work.shard(number)) for number in shards)
    with decoder.ready(), progress_bar(total=total, desc="Responding", unit=" responses", shown=progress) as bar:
        for number in shards:
            rows = []
            for batch in work.batches(number):
                keys = [work.key(*each) for each in batch]
                likelihood = Likelihood()
                prompts = [work.prompts[place].ids for place, _ in batch]
                answers = decoder(prompts, decoder.sampling.uniforms(keys), likelihood)
                for (place, sample), ids, each in zip(batch, answers, likelihood.of(answers), strict=True):
                    text = decoder.text(ids, work.prompts[place].continued)
                    rows.append(work.row(place, sample, text, ids, decoder.ended(ids), sum(each)))
                tokens += sum(map(len, answers))
                bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            folder.write_shard(number, rows)


def _ask(work: Work, shards: Sequence[int], server: ServedAnswers, folder: ResponseFolder, progress: bool) -> None:
    """Write shards of a server's answers, one after the other."""
    total = sum(len(work.shard(number)) for number in shards)
    with progress_bar(total=total, desc="Responding", unit=" responses", shown=progress) as bar:
        for number in shards:
            rows = []
            for batch in work.batches(number):
                prompts = [work.prompts[place] for place, _ in batch]
                answers = server(prompts, [work.key(*each) for each in batch])
                for (place, sample), found in zip(batch, answers, strict=True):
                    reason = "stop" if found.ended else CUT
                    rows.append(work.row_of_text(place, sample, found.text, found.tokens, reason))
                bar.update(len(batch))
            folder.write_shard(number, rows)


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"distill_llm": version("distill_llm"), **versions, "device": name}
