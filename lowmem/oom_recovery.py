"""Repeats a micro-batch in smaller parts when it does not fit, with the gradients of the whole.

A smaller batch size is another training: other groups, other averages. Here the batch stays, and only the number of
rows that are in memory at once is halved. The loss of a row is divided by constants of the whole micro-batch, so the
parts add up to the same gradient, and gradients that were there before are put back before every attempt.

    recovery = OomRecovery(model)
    for micro_batch in micro_batches:
        def run(max_rows):  # forward and backward of all rows, at most `max_rows` at once
            for part in micro_batch.split(max_rows):
                (loss_of_rows(part).sum() / rows_of_the_whole_step).backward()
        recovery.run(len(micro_batch), run)
    optimizer.step()
    print(recovery.num_recoveries, recovery.events)

The number of rows that fitted is kept for the micro-batches that follow. Nothing may communicate inside `run`: only
one of several processes may be out of memory.
"""

import gc
import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from lowmem.shared_prefix_checks import active_noise, forward_dependent_adapters

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_WORDS = re.compile(
    "can(no|')t allocate memory|out of memory|bad_alloc|could not create a memory|CUDNN_STATUS_NOT_SUPPORTED"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device: CPU allocators raise plain RuntimeErrors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


class OomRecovery:
    """Runs micro-batches and repeats those that are out of memory with half the rows at once.

    Attributes:
        max_rows: most rows at once that are tried from now on; None until the first out-of-memory.
        events: one dict per out-of-memory, `rows` at once when it happened and the `retry_rows` tried next.
        num_recoveries: micro-batches that ended well after at least one out-of-memory.

    Args:
        model: whose gradients are put back. It must not draw random numbers (dropout) in training.
        max_events: after so many out-of-memories of a run the next one is raised.

    Raises:
        NotImplementedError: if dropout is active, or an adapter depends on the other rows: the repetition would not
            train on the same numbers.
    """

    def __init__(self, model: nn.Module, max_events: int = 100):
        if noise := list(active_noise(model)):
            raise NotImplementedError(
                f"Out-of-memory recovery needs a model without dropout and noise, but {len(noise)} rates are not 0, "
                f"the first being {noise[0]}: parts of a micro-batch draw other random numbers than the whole. Set "
                "them to 0."
            )
        if adapters := forward_dependent_adapters(model):
            raise NotImplementedError(
                f"Out-of-memory recovery is not shown to be exact with the PEFT adapter ({', '.join(adapters)}), "
                "which may treat parts of a micro-batch unlike the whole. Use LoRA, or leave the recovery off."
            )
        self.model, self.max_events = model, max_events
        self.max_rows: int | None = None
        self.num_recoveries = 0
        self.events: list[dict] = []

    def run(self, num_rows: int, step: Callable[[int], Result]) -> Result:
        """`step(max_rows)`, with the largest `max_rows` up to `num_rows` that fits, halving from there.

        `step` runs forward and backward of all rows and is repeated from its beginning. Where gradients exist already
        (later micro-batches of an optimizer step), they are copied to the host first.

        Raises:
            torch.OutOfMemoryError: if one row alone does not fit, or after `max_events` out-of-memories.
        """
        max_rows = min(num_rows, self.max_rows or num_rows)
        before = [(p, None if p.grad is None else p.grad.to("cpu", copy=True)) for p in self.model.parameters()]
        is_repeated = False
        while True:
            try:
                result = step(max_rows)
                self.num_recoveries += is_repeated
                return result
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                if max_rows == 1 or len(self.events) >= self.max_events:
                    bound = "with one row at once" if max_rows == 1 else f"after {self.max_events} recoveries"
                    raise torch.OutOfMemoryError(
                        f"out of memory {bound}, so the micro-batch cannot be split: {text}"
                    ) from error
            # Outside the `except` block, where the traceback would keep the failed graph alive
            is_repeated = True
            self._put_back(before)
            self.max_rows = max_rows // 2
            self.events.append({"rows": max_rows, "retry_rows": self.max_rows, "error": text})
            logger.warning("out of memory with %d rows at once, repeating with %d (%s)", max_rows, max_rows // 2, text)
            max_rows //= 2

    @staticmethod
    def _put_back(before) -> None:
        for parameter, grad in before:
            if grad is None:
                parameter.grad = None
            else:
                parameter.grad.copy_(grad)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
