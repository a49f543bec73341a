"""Models whose config asks for outputs without names (`return_dict: false`, as old configs do): every call works all the same."""

import copy

import pytest
import torch
from builders.causal import data_of, word_tokenizer, words
from builders.families import family_batch, family_model, uneven_plan
from builders.trainers import rows, trainer_of

import distill_llm
from distill_llm.data import collator, encode
from distill_llm.data.kinds.prompts import prompts
from distill_llm.evaluation import evaluate_model

TASK = prompts(metric="exact_match", max_new_tokens=3)
TEXTS = encode(
    data_of(TASK, prompt=[words(1, 2), words(3)], response=[words(4), words(5, 6)]), word_tokenizer(pad=True), 32
).test
COLLATOR = collator(TASK, word_tokenizer(pad=True))


def statistics(model, teacher, folder):
    found = distill_llm.collect_statistics(model, [family_batch(model)], loss="kl", teacher=teacher)
    return [row.taylor.tolist() for row in found.units["heads"]]


def pruned(model, teacher, folder):
    student = distill_llm.prune(model, uneven_plan(model))
    assert student.config.return_dict == model.config.return_dict
    return distill_llm.profile(student, 2, 8, repeats=1).flops


def compared(model, teacher, folder):
    return distill_llm.compare(model, teacher, 2, 8, repeats=1).other.flops


def trained(model, teacher, folder):
    losses = {"labels": {}, "logits": {}, "hidden": {"layers": "uniform"}}
    data = rows(model)
    trainer = trainer_of(folder, copy.deepcopy(model), teacher, data, losses, max_steps=2)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.evaluate(data)["eval_loss"]


def evaluated(model, teacher, folder):
    return evaluate_model(model, TEXTS, TASK, COLLATOR, progress=False)


CALLS = {"statistics": statistics, "prune": pruned, "compare": compared, "train": trained, "evaluate": evaluated}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_what_a_config_says_of_names_changes_nothing_and_stays(tmp_path, name, call):
    """Heads of both families cannot run so in transformers themselves."""
    if (name, call) == ("modernbert", "evaluate"):
        pytest.skip("it writes no answers")
    found = []
    for said in (True, False):
        torch.manual_seed(0)
        model, teacher = family_model(name, num_labels=2), family_model(name, seed=1, num_labels=2)
        model.config.return_dict = teacher.config.return_dict = said
        found.append(CALLS[call](model, teacher, tmp_path / str(said)))
        assert model.config.return_dict is said and teacher.config.return_dict is said
    assert found[0] == found[1]
    with pytest.raises(AttributeError, match="'tuple' object has no attribute"):
        model(**family_batch(model))
