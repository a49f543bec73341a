"""Generation as the whole package does it: under settings of its own, batches of prompts padded on the left."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.common.errors import InputError
from distill_llm.common.processes import exact_device
from distill_llm.data.answers import answer_text
from distill_llm.data.causal import CausalCollator
from distill_llm.data.special_tokens import document_end
from distill_llm.losses.labels import IGNORED
from distill_llm.responses.sampling import Draw, Known, Likelihood, Sampling, Watching


class Decoder:
    """Answers prompts with a causal LM.

    An answer ends at the tokenizer's EOS, at the ends that the model's generation config names, or after
    `max_new_tokens`; nothing else of that config counts, and only tokens of the tokenizer are generated.

    Args:
        model: a causal LM, on its device.
        collator: of the task `prompts`, for padding on the left.
        sampling: the settings.
        field: the model's name in messages.
    """

    def __init__(self, model: PreTrainedModel, collator: CausalCollator, sampling: Sampling, field: str = "model"):
        self.model, self.collator, self.sampling, self.field = model, collator, sampling, field
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = {document_end(collator.tokenizer), *(own if isinstance(own, list) else [own])}
        self.ends = sorted(int(end) for end in ends if end is not None)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in evaluation mode with plain greedy decoding; both come back afterwards."""
        before = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.collator.pad,
        )
        try:
            # No inference mode: what a model in training keeps of a forward must stay usable.
            with evaluating(self.model), torch.no_grad():
                yield
        finally:
            self.model.generation_config = before

    def __call__(
        self,
        prompts: Sequence[list[int]],
        uniforms: np.ndarray | None = None,
        likelihood: Likelihood | None = None,
        guide: Callable[[torch.Tensor], LogitsProcessor] | None = None,
    ) -> list[list[int]]:
        """The tokens of each answer, its end token among them; call it inside `ready`.

        Args:
            prompts: B lists of token ids.
            uniforms: (B, max_new_tokens) of `Sampling.uniforms`.
            likelihood: keeps the log-probabilities of the answers' tokens.
            guide: given the (B, T) mask of the prompts, what changes the scores just before a token is drawn.

        Raises:
            InputError: naming `field`, where its logits are not numbers.
        """
        rows = [{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in prompts]
        batch = {name: values.to(self.model.device) for name, values in self.collator.prompts(rows).items()}
        width = batch["input_ids"].shape[1]
        points = None if uniforms is None else torch.from_numpy(uniforms).to(exact_device(self.model.device))
        draw = Draw(points, width)
        last: list[LogitsProcessor] = [] if guide is None else [guide(batch["attention_mask"])]
        watching = [each for each in (likelihood, *last) if isinstance(each, Watching)]
        first: list[LogitsProcessor] = [Known(self.collator.tokens), *([] if likelihood is None else [likelihood])]
        processors = LogitsProcessorList([*first, *self.sampling.warpers(), *last, draw])
        tokens = self.model.generate(**batch, logits_processor=processors)[:, width:]  # type: ignore[operator]
        for each in watching:
            each.taken(tokens[:, -1])
        output = tokens.tolist()
        if draw.broken is not None and draw.broken.item():
            given = f"{self.model.config.model_type} in {self.model.dtype} with logits that are not numbers"
            raise InputError(self.field, given, "a model that works in this dtype, or another dtype")
        return [self._answer(ids) for ids in output]

    def ended(self, answer: list[int]) -> bool:
        """Whether an answer has its end, rather than being cut off."""
        return bool(answer) and answer[-1] in self.ends

    def text(self, answer: list[int], before: Sequence[int] = ()) -> str:
        """An answer without its end and special tokens, as it continues the tokens before."""
        return answer_text(self.collator.tokenizer, answer[:-1] if self.ended(answer) else answer, before)

    def _answer(self, ids: list[int]) -> list[int]:
        """Without the padding after the end token."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[: end + 1]
