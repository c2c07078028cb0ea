"""`lowmem.loss_comparison`: what differs is found, and what is the edge of clipping is not an error."""

import pytest
import torch

from lowmem.loss_comparison import LossComparison

ROWS, TOKENS = 4, 3


def compare(comparison, *, term=0.0, gradients=None, entropy_gradients=None, loss=None, rounding=0.0):
    """Rows whose loss is -1 or 1 and whose gradients are 1; what is given is added to those of the training step."""
    terms = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    expected = terms + term
    zeros, ones = torch.zeros(ROWS, TOKENS), torch.ones(ROWS, TOKENS)
    comparison.check(
        expected.sum() if loss is None else loss,
        terms=(terms, expected),
        gradients=(ones, ones if gradients is None else ones + gradients),
        entropy_gradients=(zeros, zeros if entropy_gradients is None else entropy_gradients),
        unit=1.0,
        rounding=rounding,
    )


def rows(*which: int, size: float = 0.5) -> torch.Tensor:
    difference = torch.zeros(ROWS, TOKENS)
    difference[list(which), 0] = size
    return difference


@pytest.fixture
def comparison():
    return LossComparison("shared_prefix", "`_compute_loss`")


def test_equal_losses_and_rounding_pass(comparison):
    for _ in range(10):
        compare(comparison, gradients=5e-5 * torch.rand(ROWS, TOKENS))
    compare(comparison, term=torch.tensor([[5e-5], [-5e-5], [5e-5], [-5e-5]]))
    compare(comparison, gradients=rows(0, 1, 2, 3, size=5e-3), rounding=1e-2)


@pytest.mark.parametrize(
    "difference",
    [
        {"term": 3e-4},
        {"loss": torch.tensor(1e-3)},
        {"term": torch.tensor([[0.1], [0.1], [-0.1], [-0.1]])},  # the sum is the same
        {"term": float("nan"), "loss": torch.tensor(0.0)},
        {"gradients": rows(0, 3)},
        {"gradients": rows(0, 3, size=3e-4)},
        {"entropy_gradients": rows(0, 3)},
    ],
    ids=lambda difference: "-".join(difference),
)
def test_what_differs_is_found_in_the_first_step(comparison, difference):
    with pytest.raises(RuntimeError, match=r"With `shared_prefix=True`.*what overrides `_compute_loss`, or set"):
        compare(comparison, **difference)
    compare(comparison)  # once it is mended


def test_a_row_at_the_edge_of_clipping_is_no_error_unless_there_is_one_in_every_step(comparison):
    for _ in range(3):
        compare(comparison, gradients=rows(1))
        compare(comparison, gradients=rows(2))
        for _ in range(100):
            compare(comparison)
    compare(comparison, gradients=rows(1))
    compare(comparison, gradients=rows(1))
    with pytest.raises(RuntimeError, match="gradients differ in 1 of 4 rows"):
        compare(comparison, gradients=rows(1))


def test_a_row_that_differs_in_every_second_step_is_found(comparison):
    """As with micro-batches of one row, and a term that only rows of positive advantage have."""
    for _ in range(2):
        compare(comparison, gradients=rows(0))
        compare(comparison)
    with pytest.raises(RuntimeError, match="gradients differ in 1 of 4 rows"):
        compare(comparison, gradients=rows(0))
    compare(comparison)  # once it is mended


def test_numbers_that_are_not_finite_without_the_option_are_not_compared(comparison):
    compare(comparison, term=1.0, loss=torch.tensor(float("nan")))
    compare(comparison, gradients=rows(0, 1, 2, 3, size=float("inf")))
