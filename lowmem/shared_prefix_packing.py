"""Several completions of a prompt in one row, where that is cheaper than a copy of the prompt's keys for each.

The obvious way gives every completion a row. Attention then reads as many copies of the prompt's keys and values as
there are completions, and makes them first; with a long prompt and short completions the copies take more time than
the completions' own work. Here a row holds g completions behind one copy of the prompt, and a mask keeps them apart:

    position     P - 1  P  P + 1 | P - 1  P  P + 1
    token        last   a1 a2    | last   b1 b2         last: the prompt's last token, one for each completion
    sees         the prompt, and what stands before it in its own completion

The tokens, positions and sums are those of separate rows, so the result is the same but for rounding.

Shapes: P prompt tokens, m completions, R_i tokens of each, g of them in a row, n rows, T tokens of the longest.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowmem.shared_prefix_checks import attention_is_stock, is_stock, transformers_model

# Model types that hand a mask of four dimensions to their attention and know places from `position_ids` alone; each is
# compared with plain rows in tests/test_shared_prefix_packing.py. Others run one completion in a row.
PACKED_MODEL_TYPES = frozenset(
    ["gemma", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "qwen2", "qwen3"]
    + ["qwen3_moe", "smollm3"]
)
# Query-key pairs whose attention takes as long as one more copy of a prompt token's keys and values: measured on a CPU
# (docs/log.md), not on a GPU.
PAIRS_PER_COPY = 64
LEAST_GAIN = 0.95  # rows are shared from this part of the cost on; above it they were slower
_STOCK = {"sdpa": (sdpa_attention_forward, sdpa_mask), "eager": (None, eager_mask)}


def can_pack(model: nn.Module) -> bool:
    """Whether completions may share a row: a type shown exact, with its own attention, all layers over all tokens."""
    inner = transformers_model(model)
    text = inner.config.get_text_config(decoder=True)
    usual = text._attn_implementation or "eager"
    is_full = set(getattr(text, "layer_types", None) or ()) <= {"full_attention"}
    return (
        text.model_type in PACKED_MODEL_TYPES
        and (ALL_ATTENTION_FUNCTIONS.get(usual), ALL_MASK_ATTENTION_FUNCTIONS.get(usual)) == _STOCK.get(usual)
        and is_stock(inner)
        and attention_is_stock(inner)
        and is_full
        and getattr(text, "sliding_window", None) is None
    )


def deal(num_completions: int, num_rows: int) -> list[range]:
    """Completions of every row, like cards, so that rows of completions in order of length are of like length."""
    return [range(row, num_completions, num_rows) for row in range(num_rows)]


def cheapest_rows(num_prefix: int, lengths: Sequence[int]) -> int:
    """The number of rows n for completions of `lengths` tokens behind `num_prefix` prompt tokens.

    A row of T tokens costs T (P + T) query-key pairs and a copy of the prompt. The least is taken of those whose rows
    are not more tokens, padding included, than one row for each completion, if that is worth it.
    """
    num = len(lengths)
    if num_prefix == 0:
        return num  # nothing to copy

    def width_and_cost(num_rows):
        width = max(sum(lengths[i] for i in row) for row in deal(num, num_rows))
        return width, num_rows * (width * (num_prefix + width) + PAIRS_PER_COPY * num_prefix)

    best, least = num, LEAST_GAIN * width_and_cost(num)[1]
    for num_rows in {math.ceil(num / num_in_row) for num_in_row in range(2, num + 1)}:
        width, cost = width_and_cost(num_rows)
        if cost < least and num_rows * width <= num * max(lengths):
            best, least = num_rows, cost
    return best


@dataclass
class PackedRows:
    """m completions in n rows behind the prompt, right-padded to T tokens.

    Attributes:
        labels: (n, T), int64, the completions' tokens, -100 on padding.
        input_ids: (n, T), int64, shifted by one: every completion begins with the prompt's last token.
        position_ids: (n, T), int64.
        attention_mask: (n, 1, T, P - 1 + T), added to the scores: 0 where a token is seen, else the lowest number.
            None for one completion in a row, whose mask is the model's own.
        starts: (m, 1), int64, where each completion begins in the flattened rows (n T,).
    """

    labels: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    starts: torch.Tensor

    def unpack(self, values: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Values (n, T) of the labels to (m, num_tokens); behind the end of a completion stands anything."""
        if values.shape != self.labels.shape:
            raise ValueError(
                f"the branch forward returned {tuple(values.shape)} for labels {tuple(self.labels.shape)}: one value "
                "for every label is expected"
            )
        places = self.starts + torch.arange(num_tokens, device=values.device)
        return values.flatten()[places.clamp(max=values.numel() - 1)]


def pack_rows(
    completions: Sequence[torch.Tensor], num_rows: int, last_prompt_id: torch.Tensor, num_prefix: int, dtype
) -> PackedRows:
    """Completions (R_i,) in `num_rows` rows; `last_prompt_id` (1,) and `num_prefix` P - 1 are the prompt's."""
    dealt = deal(len(completions), num_rows)
    rows = [[completions[i] for i in indices] for indices in dealt]
    device = last_prompt_id.device
    width = max(sum(len(ids) for ids in row) for row in rows)
    labels, input_ids, places, owners, starts = [], [], [], [], {}
    for number, (indices, row) in enumerate(zip(dealt, rows, strict=True)):
        ends = list(itertools.accumulate(len(ids) for ids in row))
        starts |= {i: number * width + end - len(ids) for i, end, ids in zip(indices, ends, row, strict=True)}
        padding = width - ends[-1]
        sizes = [len(ids) for ids in row[:-1]] + [len(row[-1]) + padding]  # padding goes on with the last completion
        owners.append(torch.cat([torch.full((size,), owner) for owner, size in enumerate(sizes)]))
        places.append(torch.cat([torch.arange(size) for size in sizes]))
        labels.append(pad(torch.cat(row), (0, padding), value=-100))
        input_ids.append(pad(torch.cat([part for ids in row for part in (last_prompt_id, ids[:-1])]), (0, padding)))
    places = torch.stack(places).clamp(
        max=max(len(ids) for ids in completions) - 1
    )  # RoPE may go by the last position
    attention_mask = None
    if num_rows < len(completions):
        owners = torch.stack(owners).to(device)
        own = (owners[:, :, None] == owners[:, None]).tril()  # (n, T, T)
        attention_mask = torch.zeros(num_rows, 1, width, num_prefix + width, dtype=dtype, device=device)
        attention_mask[..., num_prefix:].masked_fill_(~own[:, None], torch.finfo(dtype).min)
    return PackedRows(
        labels=torch.stack(labels),
        input_ids=torch.stack(input_ids),
        position_ids=places.to(device) + num_prefix,
        attention_mask=attention_mask,
        starts=torch.tensor([starts[i] for i in range(len(completions))], device=device)[:, None],
    )
