"""Relations of queries, keys and values against loops over heads and tokens."""

import pytest
import torch

from distill_llm.common.errors import InputError
from distill_llm.losses.relations import relation_distance

VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


def vectors(seed: int, heads: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, heads, 5, size, generator=generator).requires_grad_()


def by_loops(student, teacher, heads):
    total = 0.0
    for example, valid in enumerate(VALID.bool()):
        for head in range(heads):
            maps = []
            for each in (student, teacher):
                tokens = torch.stack([each[example, :, t].flatten() for t in range(5)])[valid]
                part = tokens[:, head * tokens.shape[1] // heads : (head + 1) * tokens.shape[1] // heads]
                maps.append((part @ part.T / part.shape[1] ** 0.5).softmax(-1))
            q, p = maps
            total = total + (p * (p / q).log()).sum() / heads
    return total


@pytest.mark.parametrize("heads", [1, 6, 12])
def test_value_and_gradient_equal_loops_for_other_head_counts_and_widths_and_padding_counts_nowhere(heads):
    student, teacher = vectors(0, 3, 8), vectors(1, 4, 9).detach()
    value = relation_distance(student, teacher, VALID, heads)
    (gradient,) = torch.autograd.grad(3 * value, student)
    expected = by_loops(student, teacher, heads)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, student)[0])
    assert gradient[1, :, 2:].abs().max() == gradient[2].abs().max() == 0


def test_rotated_heads_of_an_identical_layer_have_the_same_relations():
    student = vectors(0, 4, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    assert relation_distance(student, student.detach() @ rotation, VALID, 4).item() == pytest.approx(0, abs=1e-5)
    assert relation_distance(student, student.detach() @ rotation, VALID, 8).item() > 0.1


def test_bf16_vectors_give_a_value_close_to_fp32():
    student, teacher = vectors(0, 3, 8), vectors(1, 4, 9).detach()
    value = relation_distance(student.bfloat16(), teacher.bfloat16(), VALID, 6)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, by_loops(student, teacher, 6), rtol=0.05, atol=0)


def test_heads_that_do_not_divide_the_widths_are_refused_with_those_that_do():
    with pytest.raises(InputError, match=r"losses.relations.heads: got 5; .*widths 24, 36: 1, 2, 3, 4, 6, 12$"):
        relation_distance(vectors(0, 3, 8), vectors(1, 4, 9), VALID, 5)


@pytest.mark.parametrize(("sizes", "heads"), [(((3, 8), (4, 9)), 12), (((4, 16), (2, 16)), 8), (((1, 7), (2, 7)), 7)])
def test_left_out_heads_are_the_most_up_to_twelve_that_divide_both_widths(sizes, heads):
    student, teacher = vectors(0, *sizes[0]), vectors(1, *sizes[1]).detach()
    torch.testing.assert_close(relation_distance(student, teacher, VALID), by_loops(student, teacher, heads))
