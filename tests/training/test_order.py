"""The order of training examples."""

import pytest

from distill_llm.training.order import GlobalBatchSampler


@pytest.mark.parametrize("lengths", [None, [i % 7 + 1 for i in range(50)]], ids=["random", "grouped"])
def test_the_sampler_covers_the_data_in_whole_global_batches_and_repeats_by_epoch(lengths):
    epoch = 0
    sampler = GlobalBatchSampler(50, 8, seed=1, epoch=lambda: epoch, lengths=lengths)
    first = list(sampler)
    assert len(first) == len(sampler) == 56 and set(first) == set(range(50))
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first
    assert len(list(GlobalBatchSampler(50, 8, 1, lambda: 0, lengths, drop_last=True))) == 48
