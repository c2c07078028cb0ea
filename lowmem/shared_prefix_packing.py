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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowmem.shared_prefix_checks import transformers_model

# Model types that hand a mask of four dimensions to their attention and know places from `position_ids` alone; each is
# compared with plain rows in tests/test_shared_prefix_packing.py. Others run one completion in a row.
PACKED_MODEL_TYPES = frozenset(
    ["gemma", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "qwen2"]
    + ["qwen3", "qwen3_moe", "smollm3"]
)
# Query-key pairs whose attention takes as long as one more copy of a prompt token's keys and values. Measured on a CPU
# (docs/log.md); a GPU computes pairs faster than it copies, so there fewer completions share a row than could.
PAIRS_PER_COPY = 64


def can_pack(model: nn.Module) -> bool:
    """Whether completions may share a row: a type shown exact, with its own attention, all layers over all tokens."""
    inner = transformers_model(model)
    text = inner.config.get_text_config(decoder=True)
    usual = inner.config._attn_implementation or "eager"
    is_stock = ALL_ATTENTION_FUNCTIONS.get(usual) is {"sdpa": sdpa_attention_forward, "eager": None}.get(usual, inner)
    is_full = set(getattr(text, "layer_types", None) or ()) <= {"full_attention"}
    has_window = getattr(text, "sliding_window", None) is not None
    return text.model_type in PACKED_MODEL_TYPES and is_stock and is_full and not has_window


def completions_per_row(num_prefix: int, lengths: Sequence[int]) -> int:
    """g for completions of `lengths` tokens behind `num_prefix` prompt tokens.

    In a row of g, each completion of R tokens costs g R^2 pairs among the completions and 1/g of a copy of the prompt:
    least at g = sqrt(pairs per copy x P) / R, rounded down. Rows are then filled evenly.
    """
    best = int(math.sqrt(PAIRS_PER_COPY * num_prefix) / max(lengths))
    num_rows = math.ceil(len(lengths) / max(best, 1))
    return math.ceil(len(lengths) / num_rows)


@dataclass
class PackedRows:
    """m completions in n rows behind `num_prefix` prompt tokens, right-padded to T tokens.

    Attributes:
        labels: (n, T), int64, the completions' tokens, -100 on padding.
        input_ids: (n, T), int64, shifted by one: every completion begins with the prompt's last token.
        position_ids: (n, T), int64.
        attention_mask: (n, 1, T, P - 1 + T), added to the scores: 0 where a token is seen, else the lowest number.
        starts: (m, 1), int64, where each completion begins in the flattened rows (n T,).
    """

    labels: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    starts: torch.Tensor

    def unpack(self, values: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Values (n, T) of the labels to (m, num_tokens); behind the end of a completion stands anything."""
        places = self.starts + torch.arange(num_tokens, device=values.device)
        return values.flatten()[places.clamp(max=values.numel() - 1)]


def pack_rows(
    completions: Sequence[torch.Tensor], per_row: int, last_prompt_id: torch.Tensor, num_prefix: int, dtype
) -> PackedRows:
    """Rows of `per_row` completions (R_i,); `last_prompt_id` (1,) and `num_prefix` P - 1 are the prompt's."""
    rows = [completions[first : first + per_row] for first in range(0, len(completions), per_row)]
    device = last_prompt_id.device
    width = max(sum(len(ids) for ids in row) for row in rows)
    last_position = (
        num_prefix + max(len(ids) for ids in completions) - 1
    )  # also of padding: RoPE may go by the longest
    labels, input_ids, position_ids, owners, starts = [], [], [], [], []
    for number, row in enumerate(rows):
        ends = list(itertools.accumulate(len(ids) for ids in row))
        starts += [number * width + end - len(ids) for end, ids in zip(ends, row, strict=True)]
        padding = width - ends[-1]
        sizes = [len(ids) for ids in row[:-1]] + [len(row[-1]) + padding]  # padding goes on with the last completion
        owners.append(torch.cat([torch.full((size,), place, device=device) for place, size in enumerate(sizes)]))
        position_ids.append(torch.cat([torch.arange(size, device=device) for size in sizes]) + num_prefix)
        labels.append(pad(torch.cat(list(row)), (0, padding), value=-100))
        input_ids.append(pad(torch.cat([part for ids in row for part in (last_prompt_id, ids[:-1])]), (0, padding)))
    owners = torch.stack(owners)
    own = (owners[:, :, None] == owners[:, None]).tril()  # (n, T, T)
    seen = torch.cat([own.new_ones(*owners.shape, num_prefix), own], -1)[:, None]
    return PackedRows(
        labels=torch.stack(labels),
        input_ids=torch.stack(input_ids),
        position_ids=torch.stack(position_ids).clamp(max=last_position),
        attention_mask=torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min),
        starts=torch.tensor(starts, device=device)[:, None],
    )
