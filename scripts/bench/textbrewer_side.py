"""TextBrewer's `GeneralDistiller` on the objective, models and rows that the trainer gets.

What it needs to run with torch 2.13 and transformers 5: nothing is patched in its training code. Its adaptors (the
functions it asks every user for) read transformers' outputs, both models run eager attention since it compares returned
attention maps, and the teacher's adaptor picks the heads that the student kept, since it cannot compare different
numbers of heads. Its checkpoint at the end of training is switched off, so that it is not timed. The student's maps are
those after dropout, as eager attention returns them.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import common
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from distill_llm.losses.mapping import LayerPair
from distill_llm.losses.objective import Objective


def textbrewer_training(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    objective: Objective,
    hidden: list[LayerPair],
    attention: list[LayerPair],
    setting: common.Setting,
    batch_size: int,
    learning_rate: float,
) -> tuple[PreTrainedModel, Callable[[], None]]:
    """The model that will be trained, a copy, and a function that trains it for one epoch.

    fp32, shuffled batches padded to their longest row, torch's default AdamW, linear schedule, no clipping.

    Args:
        objective: with all four terms, attention distance mse. Weights are converted to TextBrewer's reductions: it
            sums over layers where we average, leaves T^2 out, and averages attention errors over keys where we sum.
        hidden, attention: the layers that the trainer compares.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import textbrewer

    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    student.config._attn_implementation = teacher.config._attn_implementation = "eager"
    labels, logits = objective.labels, objective.logits
    hidden_loss, attention_loss = objective.hidden, objective.attention
    assert labels and logits and hidden_loss and attention_loss and attention_loss.distance == "mse"
    lengths = [row[common.LENGTH] for row in setting.rows]
    keys = sum(length**2 for length in lengths) / sum(lengths)
    matches = [
        _match("hidden", "hidden_mse", pair.teacher + 1, pair.student + 1, hidden_loss.weight / len(hidden))
        for pair in hidden
    ]
    matches += [
        _match("attention", "attention_mse", place, place, attention_loss.weight * keys / len(attention))
        for place in range(len(attention))
    ]

    def adaptor_student(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
        maps = [each for each in outputs.attentions if each is not None]
        return {**_common_signals(batch, outputs), "losses": outputs.loss, "attention": maps}

    def adaptor_teacher(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
        maps = [outputs.attentions[pair.teacher][:, list(pair.heads or ())] for pair in attention]
        return {**_common_signals(batch, outputs), "attention": maps}

    distiller = textbrewer.GeneralDistiller(
        textbrewer.TrainingConfig(output_dir=tempfile.gettempdir(), device=str(student.device)),
        textbrewer.DistillationConfig(
            temperature=logits.temperature,
            kd_loss_weight=logits.weight * logits.temperature**2,
            hard_label_weight=labels.weight,
            intermediate_matches=matches,
        ),
        teacher,
        student,
        adaptor_teacher,
        adaptor_student,
    )
    distiller.save_and_callback = lambda *_: None
    rows = [{name: value for name, value in row.items() if name != common.LENGTH} for row in setting.rows]
    loader = DataLoader(rows, batch_size, shuffle=True, collate_fn=setting.collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)

    def train() -> None:
        with distiller:
            distiller.train(
                optimizer,
                loader,
                num_epochs=1,
                scheduler_class=get_linear_schedule_with_warmup,
                scheduler_args={"num_warmup_steps": 0, "num_training_steps": len(loader)},
                output_hidden_states=True,
                output_attentions=True,
            )

    return student, train


def _match(feature: str, loss: str, teacher: int, student: int, weight: float) -> dict[str, Any]:
    return {"feature": feature, "loss": loss, "layer_T": teacher, "layer_S": student, "weight": weight}


def _common_signals(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
    return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}
