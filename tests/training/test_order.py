"""The order of training examples."""

from collections import Counter

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


def sampled(size, batch_size, seed=1, **settings):
    return list(GlobalBatchSampler(size, batch_size, seed, lambda: 0, **settings))


@pytest.mark.parametrize("lengths", [None, [i % 7 + 1 for i in range(20)]], ids=["random", "grouped"])
def test_the_last_batch_is_filled_with_the_latest_examples_of_the_batches_before(lengths):
    """20 examples in batches of 8: the last has 4 of its own, then the 16th, the 15th, the 14th and the 13th."""
    order = sampled(20, 8, lengths=lengths)
    assert sorted(order[:20]) == list(range(20))
    assert order[20:] == order[12:16][::-1]
    assert max(Counter(order[16:]).values()) == 1  # no example twice in one batch


def test_data_smaller_than_a_batch_fill_it_again_and_again_from_the_end():
    order = sampled(3, 8)
    assert sorted(order[:3]) == [0, 1, 2] and order[3:] == [*order[2::-1], *order[2:0:-1]]


@pytest.mark.parametrize("drop_last", [False, True])
def test_whole_batches_are_not_filled(drop_last):
    assert sorted(sampled(16, 8, drop_last=drop_last)) == list(range(16))
