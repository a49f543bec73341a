"""Responses of batches are those of prompts asked alone; draws have the right probabilities."""

import json

import pytest
import torch
from builders.causal import word_tokenizer
from builders.responses import PROMPTS, alone, teacher
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distill_llm.common.errors import InputError
from distill_llm.common.processes import exact_device
from distill_llm.data.causal import CausalCollator
from distill_llm.losses.objective import parse_objective
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.prompts import encode_prompts
from distill_llm.responses.sampling import Draw, Sampling
from distill_llm.teachers.cache_coding import ItemCoding


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "qwen3"])
def test_greedy_batches_of_uneven_prompts_equal_a_loop_over_tokens(family: str) -> None:
    window = {"sliding_window": 6} if family == "mistral" else {}
    model, tokenizer = teacher(family, **window), word_tokenizer(begins=True)
    prompts = encode_prompts(PROMPTS, tokenizer)
    decoder = Decoder(model, CausalCollator(tokenizer), Sampling(max_new_tokens=12, temperature=0))
    config = model.generation_config
    with decoder.ready():
        found = [each for batch in (prompts[:6], prompts[6:]) for each in decoder([prompt.ids for prompt in batch])]
    wanted = [alone(model, tokenizer, prompt.ids, 12) for prompt in prompts]
    texts = [decoder.text(each, prompt.ids) for each, prompt in zip(found, prompts, strict=True)]
    assert [(text, decoder.ended(each), each) for text, each in zip(texts, found, strict=True)] == wanted
    assert len({len(tokens) for *_, tokens in wanted}) > 3  # rows of a batch end at different places
    assert model.generation_config is config


def test_a_sampled_response_is_the_same_in_every_batch_and_another_with_another_seed_or_sample() -> None:
    model, tokenizer = teacher(), word_tokenizer()
    prompts = encode_prompts(PROMPTS, tokenizer)

    def asked(batch: list, sample: int, sampling: Sampling) -> tuple:
        keys = [prompt.key + f"{sample} {sampling.seed}".encode() for prompt in batch]
        return [prompt.ids for prompt in batch], sampling.uniforms(keys)

    def answers(size: int, sample: int = 0, **settings: float) -> list:
        sampling = Sampling(max_new_tokens=8, **{"temperature": 0.8, "samples": 2, **settings})  # type: ignore[arg-type]
        decoder = Decoder(model, CausalCollator(tokenizer), sampling)
        with decoder.ready():
            batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
            return [answer for batch in batches for answer in decoder(*asked(batch, sample, sampling))]

    together = answers(11)
    assert answers(1) == answers(4) == together
    assert answers(11, sample=1) != together and answers(11, seed=1) != together
    assert answers(11, top_k=1) == answers(11, temperature=0, samples=1)


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).mul(3).expand(20_000, -1)
    points = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chosen = Draw(points[:, None], 4)(torch.zeros(20_000, 4), scores)
    assert (chosen.isfinite().sum(-1) == 1).all()
    shares = chosen.argmax(-1).bincount(minlength=50) / 20_000
    torch.testing.assert_close(shares, scores[0].softmax(-1), atol=1.01 / 20_000, rtol=0)


class WithoutDoubles(torch.Tensor):
    """As a tensor on a device without fp64; `to` brings it to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.to:
            return out.as_subclass(torch.Tensor)
        assert not (isinstance(out, cls) and out.dtype == torch.float64), "no fp64 here"
        return out


@pytest.mark.parametrize("method", ["topk", "sampled"])
def test_fp64_is_left_to_the_cpu_where_a_device_has_none(method: str) -> None:
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    points = torch.rand(4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = [Draw(points, 1)(torch.zeros(4, 1), each) for each in (scores, scores.as_subclass(WithoutDoubles))]
    assert torch.equal(drawn[0], drawn[1].as_subclass(torch.Tensor))
    coding = ItemCoding(300, 5, method)
    coded = [coding.encode(each, points[:, 0].numpy()) for each in (scores, scores.as_subclass(WithoutDoubles))]
    assert all((one == other).all() for one, other in zip(*coded, strict=True))
    assert [exact_device(torch.device(name)).type for name in ("mps", "cuda", "cpu")] == ["cpu", "cuda", "cpu"]


def test_temperature_top_k_and_top_p_cut_as_defined() -> None:
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def kept(**settings: float) -> torch.Tensor:
        cut = scores
        for warper in Sampling(**settings).warpers():  # type: ignore[arg-type]
            cut = warper(torch.zeros(1, 1, dtype=torch.long), cut)
        return cut.softmax(-1)[0]

    torch.testing.assert_close(kept(), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    torch.testing.assert_close(kept(temperature=0.5), torch.tensor([16, 9, 4, 1]) / 30)
    torch.testing.assert_close(kept(top_k=2), torch.tensor([4, 3, 0, 0]) / 7)
    torch.testing.assert_close(kept(top_p=0.75), torch.tensor([4, 3, 2, 0]) / 9)


def test_random_numbers_are_even_and_belong_to_the_key() -> None:
    numbers, other = Sampling(max_new_tokens=10_000).uniforms([b"a", b"b"])
    counts = torch.histc(torch.from_numpy(numbers), bins=10, min=0, max=1)
    assert (counts - 1000).abs().max() < 120
    assert abs(torch.corrcoef(torch.tensor([numbers, other]))[0, 1]) < 0.05
    assert (Sampling(max_new_tokens=5).uniforms([b"c", b"a"])[1] == numbers[:5]).all()
    assert Sampling(temperature=0).uniforms([b"a"]) is None


def test_logits_that_are_not_numbers_name_the_model() -> None:
    model, tokenizer = teacher(), word_tokenizer()
    model.lm_head.weight.data.fill_(float("nan"))
    decoder = Decoder(model, CausalCollator(tokenizer), Sampling(temperature=0, max_new_tokens=2), "student")
    with decoder.ready(), pytest.raises(InputError, match="student: got .*not numbers"):
        decoder([[1, 2]])


def test_a_token_behind_a_gap_of_the_ids_can_be_an_answer() -> None:
    state = json.loads(word_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"]["a"] = 110
    names = {"eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)
    model = teacher(vocab_size=128)
    sampling = Sampling(max_new_tokens=2, temperature=0)
    hidden = model.model(torch.tensor([[1, 2, 3]])).last_hidden_state[0, -1]
    model.lm_head.weight.data[110] = hidden.detach() * 10
    decoder = Decoder(model, CausalCollator(tokenizer), sampling)
    with decoder.ready():
        assert decoder([[1, 2, 3]])[0][0] == 110 > len(tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_rows_of_a_padded_vocabulary_are_never_answers(temperature: float) -> None:
    tokenizer = word_tokenizer()
    model = teacher(vocab_size=len(tokenizer) + 31)
    model.lm_head.weight.data[len(tokenizer) :] *= 50  # far more probable, one way or the other
    sampling = Sampling(max_new_tokens=8, temperature=temperature)
    decoder = Decoder(model, CausalCollator(tokenizer), sampling)
    with decoder.ready():
        answers = decoder([[1, 2, 3]] * 8, sampling.uniforms([bytes([i]) for i in range(8)]))
    assert max(max(answer) for answer in answers) < len(tokenizer)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_draws_have_the_same_ranges_off_line_and_on_policy(given: dict) -> None:
    ((field, value),) = given.items()
    with pytest.raises(
        InputError, match=f"^{field}: got {value}; accepted: a (whole )?number (of at least|above)"
    ) as caught:
        Sampling(**given)
    with pytest.raises(InputError) as other:
        parse_objective({"logits": {}, "responses": given})
    assert str(other.value) == f"losses.responses.{caught.value}"
