"""What a draft has to know of a model: found without weights."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.checks.models import skeleton
from distill_llm.data.decoders import is_decoder
from distill_llm.data.kinds import kind_of_head
from distill_llm.data.kinds.masked_lm import MaskedLM
from distill_llm.measuring.counting import count_params
from distill_llm.models.finding import OpenModel, open_model
from distill_llm.models.limits import longest_input


@dataclass(frozen=True)
class ModelFacts:
    """A model, as to what can be made of it.

    Attributes:
        opened: config and tokenizer.
        bare: on the meta device, without a head.
        task: what it is fine-tuned for, as far as its head says so: classification or regression.
        why: in a few words.
        writes: whether it is a decoder that writes text.
        masked: whether it predicts hidden words.
        params: in all.
    """

    opened: OpenModel
    bare: PreTrainedModel
    task: str | None
    why: str
    writes: bool
    masked: bool
    params: int

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.opened.tokenizer.chat_template)

    @property
    def longest(self) -> int | None:
        """Tokens that it takes at once; None: any number."""
        return longest_input(self.opened.config.get_text_config())

    @property
    def neurons(self) -> int:
        """Of an FFN."""
        config = self.opened.config
        return int(getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None) or 1)

    @property
    def layers(self) -> int:
        """How many."""
        return len(layers_of(self.bare))


def facts_of_model(name: str, trust_remote_code: bool = False) -> ModelFacts:
    """Open a model without its weights.

    Raises:
        InputError: naming `model`.
    """
    opened = open_model("model", name, True, trust_remote_code)
    config = opened.config
    kind = kind_of_head(config.architectures)
    task, why = None, ""
    if kind is not None and kind.item == "example":
        task = "regression" if config.num_labels == 1 or config.problem_type == "regression" else "classification"
        why = "the model has one output" if task == "regression" else f"the model has {config.num_labels} classes"
    bare = skeleton(opened)
    writes = is_decoder(config) and task is None
    return ModelFacts(opened, bare, task, why, writes, isinstance(kind, MaskedLM), count_params(bare)[0])
