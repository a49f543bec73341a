"""Students that read images: taught by logits and by features of another width, and without images."""

import pytest
import torch
from builders.families import family_model
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from distill_llm import DistillationConfig, DistillationTrainer
from distill_llm.common.errors import InputError
from distill_llm.data.images import ImageCollator
from distill_llm.synthesis.ascent import Ascent, climb
from distill_llm.synthesis.generator import Adversary, GeneratorSettings
from distill_llm.synthesis.spaces import PixelSpace
from distill_llm.training.adversarial import AdversarialTrainer


def images(count=8):
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(count, 2, 6, 12, generator=draws).tolist()
    return [{"pixel_values": value, "labels": number % 3} for number, value in enumerate(values)]


def config(folder, **changes):
    fields = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "optim": "sgd", "use_cpu": True}
    fields |= {"report_to": "none", "save_strategy": "no", "max_grad_norm": 0, "weight_decay": 0, "logging_steps": 1}
    return DistillationConfig(output_dir=str(folder), **{**fields, **changes})


@pytest.mark.slow
def test_two_steps_with_labels_logits_and_states_of_another_width_are_those_by_hand(tmp_path):
    teacher, student = family_model("vit"), family_model("vit", seed=1, hidden_size=16, num_hidden_layers=2)
    losses = {"labels": {"weight": 0.5}, "logits": {"temperature": 2.0}, "hidden": {"layers": "last"}}
    by_hand = family_model("vit", seed=1, hidden_size=16, num_hidden_layers=2)
    args = config(tmp_path, losses=losses, lr_scheduler_type="constant")
    trainer = DistillationTrainer(student, teacher, args, train_dataset=images(), data_collator=ImageCollator(9))
    (projection,) = [module for module in trainer.terms.projections.modules() if isinstance(module, torch.nn.Linear)]
    own = torch.nn.Linear(16, 32, bias=projection.bias is not None)
    own.load_state_dict(projection.state_dict())
    seen = []
    trainer.data_collator = recording(ImageCollator(9), seen)
    trainer.train()

    parameters = [*by_hand.parameters(), *own.parameters()]
    for batch in seen:
        given = {"pixel_values": batch["pixel_values"], "output_hidden_states": True}
        with torch.no_grad():
            target = teacher(**given)
        found = by_hand.train()(**given)
        labels = F.cross_entropy(found.logits, batch["labels"])
        soft = F.kl_div((found.logits / 2).log_softmax(-1), (target.logits / 2).softmax(-1), reduction="batchmean") * 4
        states = F.mse_loss(own(last_state(by_hand, batch)), last_state(teacher, batch).detach())
        (0.5 * labels + soft + states).backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 1e-2 * parameter.grad
                    parameter.grad = None
    for (name, found), expected in zip(student.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


def last_state(model, batch):
    """What the last layer gives, before the norm behind it."""
    kept = []
    handle = model.vit.layers[-1].register_forward_hook(lambda module, args, output: kept.append(output))
    model(pixel_values=batch["pixel_values"])
    handle.remove()
    return kept[0]


def recording(collator, seen):
    def collate(features):
        seen.append(collator(features))
        return seen[-1]

    return collate


@pytest.mark.slow
def test_a_convolutional_student_learns_from_outputs_and_layers_without_masks_are_refused(tmp_path):
    sizes = {"num_channels": 2, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    student = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3, downsample_in_first_stage=False))
    before = student.classifier[1].weight.detach().clone()
    trainer = DistillationTrainer(
        student,
        family_model("vit"),
        config(tmp_path, losses={"logits": {}}),
        train_dataset=images(),
        eval_dataset=images(),
        data_collator=ImageCollator(),
    )
    trainer.train()
    assert not torch.equal(student.classifier[1].weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
    narrow = family_model("vit", seed=1, num_hidden_layers=2)
    args = config(tmp_path, losses={"hidden": {"layers": "uniform"}})
    without = DistillationTrainer(
        narrow, family_model("vit"), args, train_dataset=images(), data_collator=ImageCollator()
    )
    with pytest.raises(InputError, match=r"^data_collator: got .*let the collator add attention_mask"):
        without.train()


@pytest.mark.slow
def test_a_student_learns_from_images_that_were_made(tmp_path):
    teacher, student = family_model("vit"), family_model("vit", seed=1, num_hidden_layers=2)
    space, classes = PixelSpace.of((2, 6, 12), -2.0, 2.0), torch.arange(6) % 3
    made = climb(teacher, space, classes, Ascent(30, 0.1, statistics=1.0), torch.Generator().manual_seed(0))
    assert made.shape == (6, 2, 6, 12) and made.abs().max() <= 2
    with torch.no_grad():
        assert (teacher(pixel_values=made).logits.argmax(-1) == classes).float().mean() > 0.6
    adversary = Adversary(space, GeneratorSettings(noise=4, width=16, rows=4, every=1))
    trainer = AdversarialTrainer(
        student,
        teacher,
        config(tmp_path, losses={"logits": {}}),
        adversary=adversary,
        train_dataset=images(),
        data_collator=ImageCollator(),
    )
    before = {name: each.clone() for name, each in adversary.network.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(each, before[name]) for name, each in adversary.network.state_dict().items())
