"""A network that makes inputs on which student and teacher disagree (data-free adversarial distillation)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill_llm.architectures.modes import frozen
from distill_llm.models.inputs import forward_inputs
from distill_llm.responses.sampling import random_numbers
from distill_llm.synthesis.spaces import Space


@dataclass(frozen=True)
class GeneratorSettings:
    """How the generator is made and trained.

    Attributes:
        noise: numbers that it makes an input of, for each place (token, pixel).
        width: of its hidden layers.
        learning_rate: of its Adam.
        every: optimizer steps of the student for each of the generator's.
        rows: inputs of a step of the generator.
        disagreement: weight of the mean absolute difference of the logits of teacher and student, which it makes large (Fang et
            al., 2019).
        balance: weight of the entropy of the mean of the teacher's distributions, which it makes large, so that all classes
            occur (Chen et al., 2019).
        confidence: weight of the cross-entropy of the teacher with its own likeliest class, which it makes small (Chen et al.,
            2019).
        seed: of its weights and of all noise.
    """

    noise: int = 32
    width: int = 128
    learning_rate: float = 1e-3
    every: int = 5
    rows: int = 32
    disagreement: float = 1.0
    balance: float = 1.0
    confidence: float = 0.1
    seed: int = 0


class Generator(nn.Module):
    """From noise (B, P, Z) to standardised values of a space: P places (tokens, or rows of pixels) of equal size.

    Noise and a learnt vector for each place go through two layers that mix neighbouring places. The output of each place is
    normalised, so no input leaves the space, however far the student is from its teacher.

    Args:
        places: P.
        size: values of a place.
        settings: see `GeneratorSettings`.
    """

    def __init__(self, places: int, size: int, settings: GeneratorSettings):
        super().__init__()
        self.places, self.size, self.noise = places, size, settings.noise
        self.enter = nn.Linear(settings.noise, settings.width)
        self.place = nn.Parameter(torch.zeros(places, settings.width))
        self.mix = nn.ModuleList([nn.Conv1d(settings.width, settings.width, 3, padding=1) for _ in range(2)])
        self.leave = nn.Linear(settings.width, size)
        self.norm = nn.LayerNorm(size, elementwise_affine=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Values (B, P, size) of noise (B, P, Z)."""
        hidden = nn.functional.gelu(self.enter(noise) + self.place)
        for layer in self.mix:
            hidden = hidden + nn.functional.gelu(layer(hidden.transpose(1, 2)).transpose(1, 2))
        return self.norm(self.leave(hidden))


class Adversary:
    """A generator with its optimizer: makes batches, and learns from what teacher and student say of them.

    Every number that it draws depends on the seed, the optimizer step and the place of the row in the global batch alone: batches
    may be divided in any way, all processes hold the same generator, and a resumed training goes on with the same bits.

    Args:
        space: of the inputs.
        settings: see `GeneratorSettings`.
    """

    def __init__(self, space: Space, settings: GeneratorSettings):
        self.space, self.settings = space, settings
        places, size = _places(space.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = Generator(places, size, settings)
        self.network = network.to(space.mean.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)

    def inputs(self, rows: int, step: int, first: int = 0) -> Tensor:
        """Inputs (rows, *shape), differentiable in the generator's weights.

        Args:
            step: optimizer steps done; -n-1 for step n of a warm-up.
            first: place of the first row in the global batch.
        """
        noise = torch.stack([self._noise(step, first + row) for row in range(rows)]).to(self.space.mean.device)
        values = self.network(noise)
        return self.space.whole(values.reshape(rows, *self.space.shape))

    def fill(self, batch: Mapping[str, Any], rows: int, step: int, first: int = 0) -> dict[str, Any]:
        """A batch whose inputs are made here, without gradient; its other columns stay."""
        with torch.no_grad():
            return {**batch, **self.space.batch(self.inputs(rows, step, first))}

    def learn(self, teacher: PreTrainedModel, student: PreTrainedModel | None, step: int) -> dict[str, float]:
        """One step of the generator; without a student (a warm-up) nothing disagrees. No weight of a model changes.

        Returns:
            The loss's parts, unweighted.
        """
        do = self.settings
        with frozen(teacher), torch.enable_grad():
            # Rows beyond those of any batch: what the student learns from is not what the generator is judged by.
            inputs = self.inputs(do.rows, step, first=2**32)
            target = _logits(teacher, self.space, inputs)
            parts = {"balance": -_entropy(target.softmax(-1).mean(0))}
            parts["confidence"] = nn.functional.cross_entropy(target, target.detach().argmax(-1))
            if student is not None:
                with frozen(student):
                    parts["disagreement"] = -(target - _logits(student, self.space, inputs)).abs().mean()
            loss = torch.stack([getattr(do, name) * part for name, part in parts.items()]).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return {name: float(part.detach()) for name, part in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimizer's moments."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _noise(self, step: int, row: int) -> Tensor:
        numbers = random_numbers(f"{self.settings.seed} {step} {row}".encode())
        return torch.from_numpy(numbers.standard_normal((self.network.places, self.network.noise), dtype="float32"))


def _logits(model: PreTrainedModel, space: Space, inputs: Tensor) -> Tensor:
    return model(**forward_inputs(model, space.batch(inputs))).logits.float()  # type: ignore[no-any-return]


def _entropy(shares: Tensor) -> Tensor:
    """In nats, of (C,)."""
    return -torch.special.xlogy(shares, shares).sum()


def _places(shape: tuple[int, ...]) -> tuple[int, int]:
    """Embeddings (T, H): T places of H values. Images (C, h, w): C h places of w values."""
    *outer, size = shape
    places = 1
    for each in outer:
        places *= each
    return places, size
