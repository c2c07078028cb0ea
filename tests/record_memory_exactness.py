"""How far every memory strategy that communicates ends from one plain process: results/memory_exactness.md.

    python tests/record_memory_exactness.py

Each run is `memory_probe.py`: four optimizer steps of RLOOTrainer, two on every rollout, on the same completions.
"""

import sys
import tempfile
from pathlib import Path

import torch
from record_origin import origin
from torchrun import ROOT, largest_difference, probe

sys.path[:0] = [str(ROOT)]

from lowmem.zero2 import zero2_config  # noqa: E402

COMMON = {"num_iterations": 2, "max_steps": 4}
ZERO2 = {"deepspeed": zero2_config(bucket_elements=100_000), "_hook": "test_zero2:watch"}
SPLIT = {"sequence_parallel_size": 2}
ACCUMULATED = {"gradient_accumulation_steps": 2}
# words, processes, rows of one process (or of one group that splits sequences), settings
RUNS = (
    ("DDP", 2, 4, {}),
    ("ZeRO-2 with offload", 1, 8, ZERO2),
    ("ZeRO-2 with offload", 2, 4, ZERO2),
    ("ZeRO-2 with offload", 4, 2, ZERO2),
    ("ZeRO-2 with offload, gradients accumulated twice", 2, 2, ZERO2 | ACCUMULATED),
    ("split sequences", 2, 8, SPLIT),
    ("split sequences", 4, 8, {"sequence_parallel_size": 4}),
    ("data parallel 2 x sequence 2", 4, 4, SPLIT),
    ("data parallel 2 x sequence 2, ZeRO-2 with offload", 4, 4, SPLIT | ZERO2),
    ("the same, gradients accumulated twice", 4, 2, SPLIT | ZERO2 | ACCUMULATED),
)


def norms(result: dict) -> torch.Tensor:
    return torch.tensor([log["grad_norm"] for log in result["log"] if "grad_norm" in log], dtype=torch.float64)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="exactness-"))
    lines, references = [], {}
    for number, (words, processes, rows, settings) in enumerate(RUNS):
        accumulate = settings.get("gradient_accumulation_steps", 1)
        if accumulate not in references:
            alone = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
            references[accumulate] = probe(folder / f"reference{accumulate}", COMMON | alone)[0]
        reference = references[accumulate]
        run = COMMON | settings | {"per_device_train_batch_size": rows}
        results = probe(folder / str(number), run, processes)
        expected = norms(reference)
        norm = max(((norms(result) - expected) / expected).abs().max().item() for result in results)
        weight = max(largest_difference(result["weights"], reference["weights"]) for result in results)
        held = [result["bytes"] for result in results if "bytes" in result]
        part = {round(h["gradient_bytes"] / h["full_gradient_bytes"], 4) for h in held}
        lines.append(f"| {words} | {processes} | {norm:.1e} | {weight:.1e} | {', '.join(map(str, part)) or '1'} |")
        print(lines[-1], flush=True)
    head = [
        "# How far a strategy ends from one process",
        "",
        "A Qwen3 with 4 layers of 32 and tied embeddings, float32, 8 ragged rows per step in groups of 4, left-padded "
        "prompts, beta 0.1; four optimizer steps of RLOOTrainer, two on every rollout. Largest differences over "
        "steps, weights and processes.",
        origin("tests/record_memory_exactness.py", "cpu, gloo"),
        "",
        "| strategy | processes | gradient norm, relative | weights | gradients per process |",
        "|---|---|---|---|---|",
    ]
    (ROOT / "results/memory_exactness.md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
