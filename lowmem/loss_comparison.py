"""Whether the losses whose gradients were accumulated are the loss of the training step.

A trainer that runs several backward passes of its own differentiates the terms of a loss, row by row, and logs the
loss of the whole step. A subclass may have made either its own: a term added to the total, a statistic over the rows
at hand. Then the logged loss is right and the gradients are not, without an error. So both are computed, and compared.

Shapes: B rows of a training step, T tokens of the longest completion.
"""

from dataclasses import dataclass

import torch

RELATIVE = 1e-4
EDGE_ROWS = 0.01  # share of a step's rows, at least one of them, and of all rows so far, at least `EDGE_STEPS`
EDGE_STEPS = 2  # in a row


@dataclass
class LossComparison:
    """Compares values, which show a term that is spread thinly over tokens, and gradients with respect to
    log-probabilities and entropies: where the policy has sampled the tokens itself every importance ratio is 1, and
    losses with other gradients have the same value.

    At the edge of clipping the gradient jumps, and rounding decides. So the gradients of one row of a step, or of one
    in a hundred, may differ, in two steps in a row but not in three; and of all rows so far those of two, or of one in
    a hundred.

    Attributes:
        option: of the trainer, for the message.
        methods: what a subclass may override, for the message.
        num_edge_steps: training steps up to the last one, in a row, in which the gradients of a row differed.
        num_rows, num_edge_rows: of all training steps, and those of them whose gradients differed.
    """

    option: str
    methods: str
    num_edge_steps: int = 0
    num_rows: int = 0
    num_edge_rows: int = 0

    @torch.no_grad()
    def check(
        self,
        loss: torch.Tensor,
        terms: tuple[torch.Tensor, torch.Tensor],
        gradients: tuple[torch.Tensor, torch.Tensor],
        entropy_gradients: tuple[torch.Tensor, torch.Tensor],
        unit: torch.Tensor | float,
        rounding: torch.Tensor | float = 0.0,
    ) -> None:
        """Each pair is that of the accumulated backward passes and that of the training step.

        Args:
            loss: of the training step, a scalar. Nothing is compared if it is not finite: so is training without the
                option.
            terms: (B, T) or (B, 1), whose sum the loss is.
            gradients, entropy_gradients: (B, T), of the loss.
            unit: weight of a token's loss in the loss, (B, T) or a number: in what its gradient is rounded.
            rounding: relative, (B, 1) or a number, of what terms and gradients are multiples of.

        Raises:
            RuntimeError: if they differ by more than 1e-4 of their sizes, besides rounding.
        """
        if not loss.isfinite():
            return
        accumulated, expected = terms
        difference = (accumulated - expected).abs().sum() + (accumulated.sum() - loss).abs()
        size = expected.abs()
        is_same = difference <= (size * (RELATIVE + rounding)).sum()

        distances = sum((ours - theirs).abs() for ours, theirs in (gradients, entropy_gradients))
        sizes = sum(theirs.abs() for _, theirs in (gradients, entropy_gradients))
        allowed = sizes * (RELATIVE + rounding) + 16 * torch.finfo(sizes.dtype).eps * unit
        num_rows = len(distances)
        num_edge_rows = int((~(distances <= allowed) & sizes.isfinite()).any(1).sum())
        self.num_edge_steps = self.num_edge_steps + 1 if num_edge_rows else 0
        self.num_rows, self.num_edge_rows = self.num_rows + num_rows, self.num_edge_rows + num_edge_rows
        is_edge = num_edge_rows <= max(1, EDGE_ROWS * num_rows) and self.num_edge_steps <= EDGE_STEPS
        if is_same and is_edge and self.num_edge_rows <= max(EDGE_STEPS, EDGE_ROWS * self.num_rows):
            return
        self.num_edge_steps = self.num_rows = self.num_edge_rows = 0
        raise RuntimeError(
            f"With `{self.option}=True`, the losses whose gradients were accumulated differ from those of the "
            f"training step, by {difference.item():.3g} in all, where those of its rows are {size.sum().item():.3g}, "
            f"and their gradients differ in {num_edge_rows} of {num_rows} rows: the loss must be a sum over "
            "completions, each of which depends on nothing but itself and on constants that are known beforehand. "
            f"Change what overrides {self.methods}, or set `{self.option}=False`. If nothing does, please report it."
        )
