"""Folders of responses: equal to single answers, gone on with after a stop, filtered, and data to train on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.causal import EOS, THINKING_TEMPLATE, ids, word_tokenizer, words
from builders.responses import ENDS, PROMPTS, alone, answer, rows_of, save_teacher, teacher
from transformers import AutoConfig, PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.common.locks import alone_in
from distill_llm.data import DataSpec, encode, load_task
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.responses import work
from distill_llm.responses.folder import Counts, kept_rows
from distill_llm.responses.prompts import encode_prompts

SMALL = {"max_new_tokens": 10, "batch_size": 2, "progress": False, "tokenizer": word_tokenizer(begins=True)}


class Stopped(Exception):
    """What ends a run in the middle."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARD_TOKENS", 40)  # two batches of SMALL


def counting(model: PreTrainedModel, last: float = float("inf")) -> list[int]:
    """The sizes of the batches that a model generates for; it fails behind the call number `last`."""
    sizes: list[int] = []
    generate = model.generate

    def counted(**inputs: Any) -> Any:
        if len(sizes) >= last:
            raise Stopped
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    model.generate = counted  # type: ignore[method-assign, assignment]
    return sizes


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}


def test_the_folder_holds_the_greedy_answer_to_each_prompt_in_their_order(tmp_path: Path) -> None:
    model, tokenizer = teacher(), SMALL["tokenizer"]
    counts = answer(model, [*PROMPTS, *PROMPTS[:3]], tmp_path, temperature=0, keep_truncated=True, **SMALL)
    wanted = [alone(model, tokenizer, prompt.ids, 10) for prompt in encode_prompts(PROMPTS, tokenizer)]
    found = rows_of(tmp_path)
    for row, prompt in zip(found, encode_prompts(PROMPTS, tokenizer), strict=True):
        new = row["response_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt.ids, *new]])).logits[0, -len(new) - 1 : -1, : len(tokenizer)]
        likelihood = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum()
        assert row.pop("logprob") == pytest.approx(likelihood.item(), abs=1e-3)
    assert found == [
        {
            "prompt": prompt,
            "response": text,
            "response_ids": new,
            "finish_reason": "eos" if ended else "length",
            "tokens": len(new),
            "sample": 0,
            "seed": 0,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        for prompt, (text, ended, new) in zip(PROMPTS, wanted, strict=True)
    ]
    cut = sum(not ended for _, ended, _ in wanted)
    total = sum(len(new) for *_, new in wanted)
    mean = sum(row["logprob"] for row in rows_of(tmp_path)) / total
    assert counts.token_logprob == pytest.approx(mean, abs=1e-4) and mean < 0
    assert replace(counts, token_logprob=None) == Counts(14, 11, 11, total, cut, round(cut / 11, 4), 0, 0.0, 11, 1.0)
    about = json.loads((tmp_path / "responses.json").read_text())
    assert about["counts"]["tokens"] == total and about["settings"]["temperature"] == 0
    assert about["environments"][0]["device"] == "cpu" and len(about["environments"]) == 1


def test_the_folder_is_read_as_data_of_the_task_prompts_with_the_tokens_that_were_generated(tmp_path: Path) -> None:
    model, tokenizer = teacher(), word_tokenizer(begins=True)
    tokenizer.chat_template = THINKING_TEMPLATE
    off = {"enable_thinking": False}
    for chat, kwargs in ((False, None), (True, None), (True, off)):
        folder = tmp_path / f"{chat} {kwargs}"
        options = {**SMALL, "tokenizer": tokenizer, "chat": chat, "keep_truncated": True}
        options["chat_template_kwargs"] = kwargs
        answer(model, PROMPTS, folder, temperature=0, **options)
        data = load_task(DataSpec("prompts", str(folder), chat_template_kwargs=kwargs), AutoConfig.for_model("llama"))
        assert data.task.text_columns == (("messages",) if chat else ("prompt", "response"))
        encoded = encode(data, tokenizer, 64)
        found = [row["input_ids"] for rows in (encoded.train, encoded.test) for row in rows]
        prompts = [prompt.ids for prompt in encode_prompts(PROMPTS, tokenizer, chat, kwargs)]
        assert all(each[-2:] == ids(80, 81) for each in prompts) == (kwargs is not None)
        # No thought of the template's, no other end token than the one that was generated, none where the answer was cut.
        answers = [alone(model, tokenizer, each, 10)[2] for each in prompts]
        assert sorted(found) == sorted([*each, *new] for each, new in zip(prompts, answers, strict=True))
        assert {new[-1] for new in answers} - {EOS} and all(len(new) == 10 or new[-1] in ENDS for new in answers)


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_stopped_run_goes_on_to_the_files_of_one_without_a_break(stop: int, tmp_path: Path) -> None:
    options = {**SMALL, "samples": 2, "temperature": 0.9, "keep_truncated": True}
    sizes = counting(whole := teacher())
    answer(whole, PROMPTS, tmp_path / "whole", **options)
    assert sizes == [2] * 11
    counting(stopped := teacher(), last=stop)
    with pytest.raises(Stopped):
        answer(stopped, PROMPTS, tmp_path / "stopped", **options)
    with pytest.raises(InputError):  # what is not finished is no data
        load_task(DataSpec("prompts", str(tmp_path / "stopped")), AutoConfig.for_model("llama"))
    sizes = counting(again := teacher())
    answer(again, PROMPTS, tmp_path / "stopped", **options)
    assert len(sizes) == 11 - stop // 2 * 2
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    counting(idle := teacher(), last=0)
    answer(idle, PROMPTS, tmp_path / "stopped", **options)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"max_prompts": 5}, "max_prompts"),
        ({"prompts": PROMPTS[1:]}, "data"),
        ({"tokenizer": word_tokenizer(begins=True, unk_token="w1")}, "tokenizer"),
        ({"model": teacher("mistral")}, "teacher"),
    ],
)
def test_other_settings_in_a_begun_folder_are_refused_by_name(change: dict, field: str, tmp_path: Path) -> None:
    given = {"model": teacher(), "prompts": PROMPTS, "output_dir": tmp_path, **SMALL}
    answer(**given, keep_truncated=True)
    before = files_of(tmp_path)
    with pytest.raises(InputError) as caught:
        answer(**{**given, **change}, keep_truncated=True)
    assert str(caught.value).startswith(f"{field}: got")
    assert files_of(tmp_path) == before


def test_a_run_that_made_nothing_goes_on_with_a_smaller_batch(tmp_path: Path) -> None:
    options = {**SMALL, "temperature": 0.9, "keep_truncated": True}
    counting(stopped := teacher(), last=0)
    with pytest.raises(Stopped):
        answer(stopped, PROMPTS, tmp_path / "smaller", **{**options, "batch_size": 8})
    with pytest.raises(InputError, match=r"temperature: got 0\.8"):
        answer(teacher(), PROMPTS, tmp_path / "smaller", **{**options, "temperature": 0.8})
    answer(teacher(), PROMPTS, tmp_path / "smaller", **options)
    answer(teacher(), PROMPTS, tmp_path / "whole", **options)
    assert files_of(tmp_path / "smaller") == files_of(tmp_path / "whole")


def test_prompts_that_the_teacher_cannot_read_are_refused_under_its_name(tmp_path: Path) -> None:
    known = teacher(vocab_size=97)  # of words alone: an added one has no embedding
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<image>"])
    given = {"output_dir": tmp_path, "tokenizer": tokenizer, "max_new_tokens": 2, "progress": False}
    line = r"""^data: got "'<image>' in row 2"; accepted: texts whose tokens are among the 97 that LlamaForCausalLM knows$"""
    with pytest.raises(InputError, match=line):
        answer(known, [words(1), words(1), words(1) + " <image>"], **given)
    line = "^max_new_tokens: got 60; accepted: at most [0-9]+: LlamaForCausalLM takes 64 tokens, and a prompt has 5$"
    with pytest.raises(InputError, match=line):
        answer(teacher(max_position_embeddings=64), [words(1, 2, 3, 4, 5)], **{**given, "max_new_tokens": 60})


def test_other_files_are_refused_and_damaged_ones_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(InputError, match="output_dir"):
        answer(teacher(), PROMPTS, tmp_path / "other", **SMALL)
    answer(teacher(), PROMPTS, tmp_path / "done", keep_truncated=True, **SMALL)
    shard = tmp_path / "done" / "generated" / "000001.jsonl"
    whole, before = shard.read_bytes(), files_of(tmp_path / "done")
    flipped = bytearray(whole)
    flipped[30] ^= 1
    for wrong in (whole[: len(whole) // 2], (shard.parent / "000000.jsonl").read_bytes(), bytes(flipped), b"", b"\xff"):
        shard.write_bytes(wrong)
        answer(teacher(), PROMPTS, tmp_path / "done", keep_truncated=True, **SMALL)
        assert files_of(tmp_path / "done") == before
    for name in ("train.jsonl", "responses.json"):
        for text in ("", "{", "[]", '{"settings": 1}'):
            (tmp_path / "done" / name).write_text(text)
            answer(teacher(), PROMPTS, tmp_path / "done", keep_truncated=True, **SMALL)
            assert files_of(tmp_path / "done") == before
    (tmp_path / "done" / "responses.json").write_text("")
    with pytest.raises(InputError, match="^output_dir: got .*put back a copy of its responses.json, or use another"):
        answer(teacher(), PROMPTS, tmp_path / "done", keep_truncated=True, **{**SMALL, "batch_size": 1})


def test_two_at_once_in_one_folder_are_one_and_a_line(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "answers"),
        pytest.raises(InputError, match="^output_dir: got .*this process is using it$"),
    ):
        answer(teacher(), PROMPTS, tmp_path / "answers", **SMALL)
    assert not (tmp_path / "answers").exists()
    answer(teacher(), PROMPTS, tmp_path / "answers", keep_truncated=True, **SMALL)


def test_truncated_and_repeated_responses_are_left_out_and_counted() -> None:
    def row(response: str, reason: str = "eos") -> dict[str, Any]:
        new = [*response.encode(), *([EOS] if reason == "eos" else [])]
        return {
            "prompt": "p",
            "response": response,
            "response_ids": new,
            "finish_reason": reason,
            "tokens": 3,
            "logprob": -6.0,
        }

    answers = [[row("a"), row("b", "length"), row("a"), row("b")], [row("a"), row("c", "length")], [row("d", "length")]]
    kept, counts = kept_rows(answers, 5, keep_truncated=False)
    assert kept == [answers[0][0], answers[0][3], answers[1][0]]
    assert counts == Counts(5, 3, 7, 21, 3, 0.4286, 1, 0.1429, 3, 0.4286, -2.0)
    kept, counts = kept_rows(answers, 5, keep_truncated=True)
    assert kept == [answers[0][0], answers[0][1], *answers[1], *answers[2]] and (counts.repeated, counts.kept) == (2, 5)


def test_truncated_responses_can_be_had_later_without_generating_again(tmp_path: Path) -> None:
    options = {**SMALL, "samples": 6, "top_k": 2, "max_new_tokens": 3}
    counts = answer(teacher(), PROMPTS, tmp_path, **options)
    rows = rows_of(tmp_path)
    assert 0 < len(rows) == counts.kept < counts.responses == 66 and counts.repeated > 0
    assert all(row["finish_reason"] == "eos" for row in rows)
    assert len({(row["prompt"], row["response"]) for row in rows}) == len(rows)
    counting(idle := teacher(), last=0)
    more = answer(idle, PROMPTS, tmp_path, **options, keep_truncated=True)
    assert more.truncated == counts.truncated and len(rows_of(tmp_path)) == more.kept > counts.kept
    model = teacher()
    model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="max_new_tokens: got 1"):
        answer(model, [words(1)], tmp_path / "cut", **{**SMALL, "max_new_tokens": 1}, temperature=0)


def test_a_pruned_student_answers_with_its_cache_as_without(tmp_path: Path) -> None:
    model = teacher()
    plan = PruningPlan("llama", [LayerPlan(0, [], [1, 2, 5]), LayerPlan(1, [1], list(range(40)))])
    student = prune(model, plan)
    save_teacher(tmp_path / "student", student)
    options = {name: value for name, value in SMALL.items() if name != "tokenizer"}
    answer(str(tmp_path / "student"), PROMPTS, tmp_path / "out", temperature=0, keep_truncated=True, **options)
    tokenizer = SMALL["tokenizer"]
    loaded = load_pretrained(tmp_path / "student").eval()
    loaded.generation_config.eos_token_id = json.loads((tmp_path / "student" / "generation_config.json").read_text())[
        "eos_token_id"
    ]
    wanted = [alone(loaded, tokenizer, prompt.ids, 10) for prompt in encode_prompts(PROMPTS, tokenizer)]
    assert [
        (row["response"], row["finish_reason"] == "eos", row["response_ids"]) for row in rows_of(tmp_path / "out")
    ] == wanted
