"""Peak live bytes and work of one training forward and backward over k, with and without the shared prefix, counted.

    python experiments/training_peaks.py --workloads layers_3072_53 --k 2 4 8 16 32 64 --out results/training_peaks.csv

What would take hours and a hundred gigabytes runs on fake tensors, which have shapes and no data, under the same meter
as real ones; `--real` runs on data (a test compares both). Four ways, with the same LM head on the completions' rows:
`all rows` runs k copies of the prompt at once, `row by row` accumulates them one at a time, `shared` keeps one prompt
and its completions one at a time, `shared, k branches` all of them at once. Weights and gradients are counted apart,
because they are there in every way. The work is that of matrix products and attention kernels: the LM head of the
completions, which no way shares, included. Every row names the packages and the commit that it was counted with.
"""

import argparse
import csv
import io
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import yaml  # noqa: E402
from run_matrix import workload_path  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from train import environment  # noqa: E402
from transformers import AutoModelForCausalLM, masking_utils  # noqa: E402

from config import ExperimentConfig  # noqa: E402
from data import load_tokenizer, model_config  # noqa: E402
from lowmem.live_bytes import LiveBytes  # noqa: E402
from lowmem.logprobs import add_logprob_head  # noqa: E402
from lowmem.shared_prefix import PromptGroup, shared_prefix_backward  # noqa: E402
from lowmem.shared_prefix_prompt import score_chunks  # noqa: E402
from memory import ProductFlops  # noqa: E402
from memory_samples import write_atomically  # noqa: E402

CHUNK_TOKENS = 32  # whose logits the LM head makes at once, in every way
WAYS = ("all rows", "row by row", "shared", "shared, k branches")
MADE_WITH = ("torch", "transformers", "repo_commit", "repo_dirty")
COLUMNS = (
    *("workload", "prompt_tokens", "completion_tokens", "k", "gradient_checkpointing", "way"),
    *("peak_live_bytes", "weight_and_gradient_bytes", "flops", *MADE_WITH),
)


def build_model(config: ExperimentConfig, fake_mode: FakeTensorMode | None) -> nn.Module:
    """The workload's model with the chunked LM head, in training mode, with its gradients allocated."""
    torch.manual_seed(config.model_seed)
    model = AutoModelForCausalLM.from_config(model_config(config, load_tokenizer(config)), dtype=torch.float32)
    add_logprob_head(model)  # compares values once, so before they are gone
    if fake_mode is not None:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(fake_mode.from_tensor(parameter.detach()))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fake_mode.from_tensor(buffer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model.train()


def step(model: nn.Module, config: ExperimentConfig, k: int, way: str) -> None:
    """Forward and backward of one group of k completions; the loss weighs log-probabilities as an advantage would."""
    num_prompt, num_completion = config.prompt_tokens, config.response_tokens
    vocab_size = model.config.vocab_size
    prompt = torch.randint(0, vocab_size, (num_prompt,))
    completions = torch.randint(0, vocab_size, (k, num_completion))
    advantages = torch.linspace(-1.0, 1.0, k)
    if way.startswith("shared"):
        score = partial(score_chunks, temperature=config.temperature, chunk_tokens=CHUNK_TOKENS)

        def loss_fn(scores):
            return -(scores.logps.sum(-1) * advantages[scores.rows]).sum() / k

        group = PromptGroup(prompt, list(completions))
        branches = 1 if way == "shared" else k
        limits = {"max_branches": branches, "max_branch_tokens": branches * num_completion}  # as the trainers'
        shared_prefix_backward(model, [group], loss_fn, **limits, branch_forward=score, self_check=False)
        return
    rows = torch.cat([prompt.expand(k, -1), completions], 1)
    for part in torch.arange(k).split(k if way == "all rows" else 1):
        ids = {"input_ids": rows[part], "response_ids": completions[part]}
        out = model(**ids, temperature=config.temperature, chunk_tokens=CHUNK_TOKENS)
        (-(out.logps.sum(-1) * advantages[part]).sum() / k).backward()


def peak_and_work(config: ExperimentConfig, k: int, way: str, real: bool) -> tuple[int, int, int]:
    """`(peak, weights and gradients, work)` of one step: bytes, the peak with both, and floating-point operations."""
    fake_mode = None if real else FakeTensorMode()
    model = build_model(config, fake_mode)
    meter, products = LiveBytes(), ProductFlops()
    # Fake ids have no values, so transformers could not see that no row is packed, and would mask every layer.
    not_packed = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *args: None)
    with fake_mode or nullcontext(), not_packed if fake_mode else nullcontext():
        meter.track([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())])
        standing = meter.live_bytes
        with meter, products:
            step(model, config, k, way)
    return meter.peak_bytes, standing, products.flops + products.attention_flops


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workloads", nargs="+", required=True, help="names in experiments/configs")
    parser.add_argument("--k", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--real", action="store_true", help="run on data; needs the memory and the time")
    parser.add_argument("--out", type=Path, default=Path("results/local/training_peaks.csv"))
    args = parser.parse_args(argv)
    rows = []
    env = environment()
    try:
        for workload in args.workloads:
            settings = yaml.safe_load(workload_path(workload).read_text())
            for checkpointing in (False, True):
                for k in args.k:
                    config = ExperimentConfig(**settings, rloo_k=k, gradient_checkpointing=checkpointing)
                    for way in args.ways:
                        peak, standing, flops = peak_and_work(config, k, way, args.real)
                        shape = (workload, config.prompt_tokens, config.response_tokens)
                        counted_with = (env[name] for name in MADE_WITH)
                        rows.append((*shape, k, checkpointing, way, peak, standing, flops, *counted_with))
                        figures = f"{peak / 2**30:.3f} GiB, {flops:.3g} operations"
                        print(f"{workload} k={k} checkpointing={checkpointing} {way}: {figures}", flush=True)
    except ValueError as error:
        print(f"training_peaks.py: {error}", file=sys.stderr)
        return 1
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, text.getvalue())
    print(f"training_peaks.py: {args.out}")
    return 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
