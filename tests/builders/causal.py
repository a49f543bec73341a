"""A tokenizer of words, data and tiny models for causal language modelling."""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from distill_llm.data import TaskData
from distill_llm.data.tasks import Task

BOS, EOS, UNK, PAD = 0, 1, 2, 3
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)

# As Qwen3's: the last answer begins with a thought, an empty one here, which belongs to the prompt where thinking is off.
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if loop.last and m['role'] == 'assistant' %}{{ 'w80 w81 ' }}{% endif %}"
    "{{ m['content'] + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ 'w80 w81 ' }}{% endif %}{% endif %}"
)


def word_tokenizer(begins: bool = False, pad: bool = False, **special: str | None) -> PreTrainedTokenizerFast:
    """Word `wN` has id 4 + N, `user` 94 and `assistant` 95; BOS begins a text where `begins`; no padding token unless `pad`.

    Words need no space between them: a prompt and its response may meet at any place.
    """
    names = ["<s>", "</s>", "<unk>", "<pad>", *(f"w{i}" for i in range(90)), "user", "assistant", "a"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    apart = pre_tokenizers.Split(Regex("w[0-9]+|user|assistant"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), apart])
    if begins:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>" if pad else None}
    kept = {name: token for name, token in {**tokens, **special}.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=1000, **kept)


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def ids(*numbers: int) -> list[int]:
    return [4 + number for number in numbers]


def data_of(task: Task, **columns: list) -> TaskData:
    rows = Dataset.from_dict(columns)
    return TaskData(task, rows, None, rows)


def causal_model(family: str = "llama", **config: Any) -> PreTrainedModel:
    """A random model of two layers, without a padding token; weights large enough to make outputs differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "pad_token_id": None, "eos_token_id": EOS}
    if family == "phi":
        del sizes["head_dim"]
    settings = {**sizes, "max_position_embeddings": 64, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
