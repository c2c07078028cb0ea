"""What every form of recomputation keeps and repeats: one training forward and backward of one row, without data.

    python experiments/recompute_table.py --tokens 3125 --out results/memory_recompute.md

Tensors are fake, so bytes and operations are counted exactly and nothing is computed; a run takes seconds. The model
is that of configs/memory/layers.yaml. The backward adds gradients of all weights, which are in its peak.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import yaml  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from lowmem.live_bytes import LiveBytes  # noqa: E402
from lowmem.recompute import recompute_activations  # noqa: E402
from memory import ProductFlops  # noqa: E402

MIB = 2**20
RESPONSE_TOKENS = 53
# (words, ratio, selective)
FORMS = (
    ("nothing recomputed", None, False),
    ("half of the layers, attention kept", 0.5, True),
    ("half of the layers", 0.5, False),
    ("all layers, attention kept", 1.0, True),
    ("all layers", 1.0, False),
)


def measure(ratio: float | None, selective: bool, tokens: int) -> dict:
    """`held_bytes` after the forward and `peak_bytes`, both above the weights; `flops` and `attention_calls`."""
    settings = yaml.safe_load((HERE / "configs/memory/layers.yaml").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    shape = {name: settings[name] for name in (*names, "num_key_value_heads")}
    with FakeTensorMode():
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False)).train()
        if ratio is not None:
            recompute_activations(model, ratio=ratio, selective=selective)
        meter, products = LiveBytes(), ProductFlops()
        meter.track(model.parameters())
        weights = meter.live_bytes
        ids = torch.ones(1, tokens, dtype=torch.long)
        with meter, products:
            # a mask that is already decided: under fake tensors transformers would build a dense one
            masks = {"full_attention": None}
            logits = model(input_ids=ids, attention_mask=masks, use_cache=False, logits_to_keep=RESPONSE_TOKENS).logits
            held = meter.live_bytes - weights
            logits.sum().backward()
        return {
            "held_bytes": held,
            "peak_bytes": meter.peak_bytes - weights,
            "flops": products.flops,
            "attention_calls": products.attention_calls,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3125, help="of the row")
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
    text = "\n".join(lines) + "\n\nProducts: floating-point operations of matrix products against the first row.\n"
    Path(args.out).write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
