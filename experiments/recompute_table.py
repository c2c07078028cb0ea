"""What recomputation keeps and repeats, and what split sequences leave in a process: one training forward and backward
of one row, without data.

    python experiments/recompute_table.py --tokens 3125 --split_tokens 384 3125 14100 --out results/memory_recompute.md

Tensors are fake, so bytes and operations are counted exactly and nothing is computed; a run takes seconds. Processes
that split a sequence are one process and a group that does not communicate. The model is that of
configs/memory/layers.yaml. The backward adds gradients of all weights, which are in its peak.
"""

import argparse
import contextlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import yaml  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from lowmem.live_bytes import LiveBytes  # noqa: E402
from lowmem.recompute import recompute_activations  # noqa: E402
from lowmem.sequence_parallel import make_peers, split_attention  # noqa: E402
from memory import ProductFlops  # noqa: E402

MIB = 2**20
RESPONSE_TOKENS = 53
PROCESSES = (2, 4, 8)  # that split a row
# (words, ratio, selective)
FORMS = (
    ("nothing recomputed", None, False),
    ("half of the layers, attention kept", 0.5, True),
    ("half of the layers", 0.5, False),
    ("all layers, attention kept", 1.0, True),
    ("all layers", 1.0, False),
)


def build() -> Qwen3ForCausalLM:
    settings = yaml.safe_load((HERE / "configs/memory/layers.yaml").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    shape = {name: settings[name] for name in (*names, "num_key_value_heads")}
    return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False)).train()


def measure(ratio, selective: bool, tokens: int, processes: int = 1, rank: int = 0, has_head: bool = True) -> dict:
    """`held_bytes` after the forward and `peak_bytes`, both above the weights; `flops` and `attention_calls`.

    With several `processes`, of the one that is `rank` among those that split the row.
    """
    with fake_peers(processes, rank) as peers, FakeTensorMode():
        model = build()
        if peers is not None:
            split_attention(model)
        if ratio is not None:
            recompute_activations(model, ratio=ratio, selective=selective)
        meter, products = LiveBytes(), ProductFlops()
        meter.track(model.parameters())
        weights = meter.live_bytes
        own = torch.arange(rank, rank + 1) * -(-tokens // processes) + torch.arange(-(-tokens // processes))
        inputs = {"input_ids": torch.ones_like(own)[None], "position_ids": own[None], "use_cache": False}
        # a mask that is already decided: under fake tensors transformers would build a dense one
        inputs["attention_mask"] = {"full_attention": None}
        with meter, products:
            if has_head:
                out = model(**inputs, logits_to_keep=RESPONSE_TOKENS).logits
            else:
                out = model.model(**inputs, sequence_peers=peers).last_hidden_state
            held = meter.live_bytes - weights
            out.sum().backward()
        return {
            "held_bytes": held,
            "peak_bytes": meter.peak_bytes - weights,
            "flops": products.flops,
            "attention_calls": products.attention_calls,
        }


@contextlib.contextmanager
def fake_peers(processes: int, rank: int):
    if processes == 1:
        yield None
        return
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield make_peers(processes)
    finally:
        dist.destroy_process_group()


def split_lines(lengths: list[int]) -> list[str]:
    """A table of what one process holds of a row that N processes split, and its share of the whole."""
    lines = ["| tokens | recomputed | N = 1, MiB |" + "".join(f" N = {n}: MiB, share of 1/N |" for n in PROCESSES)]
    lines.append("|---|---|---|" + "---|" * len(PROCESSES))
    for tokens in lengths:
        for words, ratio, selective in (FORMS[0], *FORMS[3:]):
            whole = measure(ratio, selective, tokens, has_head=False)["held_bytes"]
            cells = [f"{tokens:,}", words, f"{whole / MIB:,.0f}"]
            for processes in PROCESSES:
                ends = (measure(ratio, selective, tokens, processes, rank, False) for rank in (0, processes - 1))
                held = max(end["held_bytes"] for end in ends)
                cells.append(f"{held / MIB:,.0f}, {held * processes / whole:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3125, help="of the row")
    parser.add_argument(
        "--split_tokens", type=int, nargs="+", default=[384, 3125, 14100], help="of a row that is split"
    )
    parser.add_argument("--out", default="results/memory_recompute.md", help="the table")
    args = parser.parse_args(argv)
    results = [(words, measure(ratio, selective, args.tokens)) for words, ratio, selective in FORMS]
    first = results[0][1]
    lines = [
        "# What recomputation keeps and repeats",
        "",
        f"Qwen3 with 57 million parameters (8 layers, hidden 512), float32, one row of {args.tokens:,} tokens, one "
        "training forward and backward; live bytes above the weights, counted on fake tensors (CPU kernels). torch "
        f"{torch.__version__.partition('+')[0]}. Made by experiments/recompute_table.py.",
        "",
        "| recomputed | held after the forward, MiB | share | peak, MiB | products | attention calls |",
        "|---|---|---|---|---|---|",
    ]
    for words, found in results:
        cells = [words, f"{found['held_bytes'] / MIB:,.0f}", f"{found['held_bytes'] / first['held_bytes']:.2f}"]
        cells += [f"{found['peak_bytes'] / MIB:,.0f}", f"{found['flops'] / first['flops']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {found['attention_calls']} |")
    lines += ["", "Products: floating-point operations of matrix products against the first row.", ""]
    lines += ["## What split sequences leave in a process", ""]
    lines.append(
        "The same model without its LM head; held after the forward by the first or last of N processes, whichever "
        "holds more. Gathered keys and values are in it: without recomputation every process keeps those of the whole "
        "row. With the attention kept, a CPU keeps two outputs of it, over the past and over the own part."
    )
    text = "\n".join([*lines, "", *split_lines(args.split_tokens)]) + "\n"
    Path(args.out).write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
