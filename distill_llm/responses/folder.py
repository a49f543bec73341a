"""The folder of generated responses: what is done is on disk, whole shards only, so the same command goes on.

    responses.json      format, settings, fingerprints, versions; when all is done the counts
    generated/N.jsonl   shards: every response, in the order of the work; the last line tells whether the shard is whole
    train.jsonl         the responses that are kept, in the order of the prompts: rows of the task `prompts`

A row has the answer as text, for people, and as the tokens that were generated (`response_ids`), which training reads.
`train.jsonl` appears when all shards are there, so nothing unfinished can be trained on.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.files import written_whole
from distill_llm.common.outputs import usable_output
from distill_llm.data.answer_choice import LOGPROB, TOKENS
from distill_llm.data.prompt_encoder import CUT, FINISH, GENERATED

Row: TypeAlias = dict[str, Any]
ABOUT, SHARDS, KEPT = "responses.json", "generated", "train.jsonl"
FORMAT = 3
FINGERPRINTS = ("teacher", "tokenizer", "data")
CHECK = "check"
SHARING = ("batch_size", "shard_responses")  # settings that decide which responses share a shard, and nothing else


@dataclass(frozen=True)
class Counts:
    """Numbers of a finished folder; truncated and repeated responses are left out of the kept ones.

    prompts_read: rows of the data; prompts: different ones among them; responses, tokens: generated; truncated: cut off
    at max_new_tokens; repeated: the same tokens as another kept response to the prompt, end aside; kept: rows of `train.jsonl`;
    token_logprob: the mean logarithm of a generated token's probability under the teacher, in nats; None of a served one.
    """

    prompts_read: int
    prompts: int
    responses: int
    tokens: int
    truncated: int
    truncated_share: float
    repeated: int
    repeated_share: float
    kept: int
    kept_share: float
    token_logprob: float | None = None


class ResponseFolder:
    """The files of one set of prompts, answered by one teacher under one set of settings.

    Args:
        folder: new, empty, or begun with the same settings and fingerprints.
        settings: that decide the responses.
        fingerprints: of FINGERPRINTS.

    Raises:
        InputError: for other files in the folder; for a folder begun otherwise, a line per setting that differs. While there
            is no shard, the batch size may: too large a one makes none.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fingerprints: Mapping[str, str]):
        self.folder = folder
        self.begun: dict[str, Any] = {"format": FORMAT, "settings": dict(settings), "fingerprints": dict(fingerprints)}
        usable_output(folder, begun=ABOUT)
        about = self.about()
        if about is not None:
            self._check_begun(about)
        elif any(not self._is_whole(shard) for shard in (folder / SHARDS).glob("*.jsonl")):
            fix = f"put back a copy of its {ABOUT}, or use another output folder: it is damaged"
            raise InputError("output_dir", str(folder), fix=fix)

    def _check_begun(self, about: Mapping[str, Any]) -> None:
        if about.get("format") != FORMAT:
            given = (
                f"{self.folder}, whose responses have the format of another version (without response_ids or logprob)"
            )
            raise InputError(
                "output_dir", given, fix="choose another folder, or remove this one to generate them again"
            )
        old, new = about["settings"], self.begun["settings"]
        free = () if any((self.folder / SHARDS).glob("*.jsonl")) else SHARING
        faults = [
            InputError(
                name, new[name], f"{old.get(name)!r}, with which {self.folder} was begun, or another output folder"
            )
            for name in new
            if old.get(name) != new[name] and name not in free
        ]
        faults += [
            InputError(name, "another one", f"the {name} with which {self.folder} was begun, or another output folder")
            for name in FINGERPRINTS
            if about["fingerprints"][name] != self.begun["fingerprints"][name]
        ]
        raise_all(faults)

    def about(self) -> dict[str, Any] | None:
        """What `responses.json` says; None where it is not there or damaged."""
        try:
            about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            is_whole = isinstance(about["settings"], dict) and isinstance(about["environments"], list)
            return about if is_whole and about["fingerprints"].keys() >= set(FINGERPRINTS) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def write_about(
        self,
        names: Mapping[str, str],
        environment: Mapping[str, str],
        counts: Counts | None = None,
        keep_truncated: bool | None = None,
    ) -> None:
        """Write `responses.json`.

        Args:
            names: of teacher and data, for people.
            environment: device and versions; those of all starts are listed, each different one once.
            counts: when all is done.
            keep_truncated: what the counts were made with.
        """
        known = (self.about() or {}).get("environments", [])
        environments = known if environment in known else [*known, environment]
        about: dict[str, Any] = {**names, **self.begun, "environments": environments}
        if counts is not None:
            about |= {"keep_truncated": keep_truncated, "counts": asdict(counts)}
        with written_whole(self.folder / ABOUT) as path:
            path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def has_shard(self, number: int) -> bool:
        """Whether a shard is there and whole, with the responses of this very command."""
        return self._is_whole(self._shard(number))

    def write_shard(self, number: int, rows: Iterable[Row]) -> None:
        """Write a shard whole."""
        lines = _lines(rows)
        shard = self._shard(number)
        with written_whole(shard) as path:
            path.write_text(
                lines + json.dumps({CHECK: self._check_of(shard, lines)}) + "\n", encoding="utf-8", newline="\n"
            )

    def read_shard(self, number: int, length: int) -> list[Row]:
        """The rows of a shard.

        Raises:
            InputError: it does not have `length` rows of JSON.
        """
        path = self._shard(number)
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-2]]
        except (OSError, ValueError):
            rows = []
        if len(rows) != length:
            raise InputError("output_dir", str(path), f"a shard of {length} responses: remove it to have it made again")
        return rows

    def write_kept(self, rows: Iterable[Row]) -> None:
        """Write the rows to train on."""
        with written_whole(self.folder / KEPT) as path:
            path.write_text(_lines(rows), encoding="utf-8", newline="\n")

    def _shard(self, number: int) -> Path:
        return self.folder / SHARDS / f"{number:06d}.jsonl"

    def _is_whole(self, shard: Path) -> bool:
        try:
            lines, _, last = shard.read_text(encoding="utf-8").removesuffix("\n").rpartition("\n")
            return json.loads(last) == {CHECK: self._check_of(shard, lines + "\n")}
        except (OSError, ValueError):
            return False

    def _check_of(self, shard: Path, lines: str) -> str:
        """A hash of a shard's lines, its number, and what decides them: a shard of other settings is none of this folder's."""
        digest = blake2b(json.dumps([shard.name, self.begun], sort_keys=True).encode(), digest_size=16)
        digest.update(lines.encode())
        return digest.hexdigest()


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def kept_rows(answers: Iterable[list[Row]], prompts_read: int, keep_truncated: bool) -> tuple[list[Row], Counts]:
    """The rows worth training on, and the counts.

    Args:
        answers: per prompt its rows, with `finish_reason`, `tokens` and, but for served teachers, `logprob` and `response_ids`.
        prompts_read: rows that the prompts were read from.
        keep_truncated: keep responses that were cut off.
    """
    kept: list[Row] = []
    prompts = responses = tokens = truncated = repeated = 0
    known: list[float] = []
    for rows in answers:
        prompts, responses = prompts + 1, responses + len(rows)
        tokens += sum(row[TOKENS] for row in rows)
        known.extend(row[LOGPROB] for row in rows if LOGPROB in row)
        truncated += sum(row[FINISH] == CUT for row in rows)
        whole = [row for row in rows if keep_truncated or row[FINISH] != CUT]
        different = {_said(row): row for row in reversed(whole)}
        repeated += len(whole) - len(different)
        kept += reversed(different.values())
    shares = [round(count / responses, 4) for count in (truncated, repeated, len(kept))]
    numbers = (truncated, shares[0], repeated, shares[1], len(kept), shares[2])
    mean = round(sum(known) / tokens, 4) if known and tokens else None
    return kept, Counts(prompts_read, prompts, responses, tokens, *numbers, mean)


def _said(row: Row) -> Any:
    """The tokens of a response without its end; the text where they are not known."""
    if GENERATED not in row:
        return row["response"] if "response" in row else row["messages"][-1]["content"]
    return tuple(row[GENERATED] if row[FINISH] == CUT else row[GENERATED][:-1])
