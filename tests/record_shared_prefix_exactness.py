"""How far the shared prefix is from k copies of the prompt, by architecture: results/shared_prefix_exactness.md.

    python tests/record_shared_prefix_exactness.py

The models, the groups and the limits are those of test_shared_prefix.py; a figure above its limit ends the script.
"""

import sys
import warnings

import torch
from record_origin import origin
from torchrun import ROOT

sys.path[:0] = [str(ROOT)]

from test_shared_prefix import TOLERANCE, assert_equals_plain, make_lora_model  # noqa: E402
from test_shared_prefix_models import MODELS, Float64Everywhere, make_groups, make_model  # noqa: E402

WORDS = {"mistral": "Mistral, window", "gemma2": "Gemma 2, window", "gemma3": "Gemma 3, window", "phi3": "Phi-3"}
WORDS |= {"qwen3": "Qwen3", "qwen3-eager": "Qwen3, eager attention", "llama": "Llama, tied embeddings"}
WORDS |= {"qwen3-moe": "Qwen3-MoE", "mixtral": "Mixtral"}


def errors(name: str, lora: bool, checkpointing: bool, dtype: torch.dtype) -> str:
    model = make_lora_model("all-linear", dtype, name) if lora else make_model(name, dtype)
    if checkpointing:
        (model.get_base_model() if lora else model).activation_checkpointing_enable()
    if dtype == torch.float64:
        with Float64Everywhere():
            found = assert_equals_plain(model, make_groups(), "grpo", max_branches=2)
    else:
        found = assert_equals_plain(model, make_groups(), "grpo", dtype=dtype, max_branches=2)
    return " | ".join(f"{error:.1e}" for error in found)


def main() -> None:
    warnings.filterwarnings("ignore")
    lines = []
    for name in MODELS:
        for lora in (False, True):
            for checkpointing in (False, True):
                cells = [errors(name, lora, checkpointing, dtype) for dtype in (torch.float64, torch.float32)]
                what = ("LoRA" if lora else "all weights", "on" if checkpointing else "off")
                lines.append(f"| {WORDS[name]} | {' | '.join((*what, *cells))} |")
                print(lines[-1], flush=True)
    limits = {dtype: "{:.0e} and {:.0e}".format(*limit) for dtype, limit in TOLERANCE.items()}
    head = [
        "# How far the shared prefix is from k copies of the prompt",
        "",
        "Models of 3 layers of 32 with random weights; prompts of 23 and 9 tokens with 4 and 2 completions of 1 to 12 "
        "tokens, two in a micro-batch, GRPO's loss. Logp: largest error of a log-probability, in nats. Gradient: "
        "largest error of a parameter's, relative to its norm. "
        f"Accepted: {limits[torch.float64]} in float64, {limits[torch.float32]} in float32.",
        origin("tests/record_shared_prefix_exactness.py", "cpu"),
        "",
        "| model | trained | checkpointing | float64: logp | gradient | float32: logp | gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    (ROOT / "results/shared_prefix_exactness.md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
