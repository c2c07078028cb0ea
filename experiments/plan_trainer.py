"""The peak of a whole trainer before it runs: the real trainer of either tree, in a dry run.

    python experiments/plan_trainer.py --config experiments/configs/cpu.yaml --variant baseline --rloo_k 8

Settings are those of experiments/train.py. Nothing is replaced but the weights: TRL's own loop, generation, rewards
and optimizer run on `lowmem.dry_run`, and `lowmem.live_bytes` counts as it does in a measured run. Prints one JSON
object: `live_peak_bytes`, `live_peak_phase`, `live_peak_bytes_by_phase`, and with `--device` a verdict.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from train import parse_config, train  # noqa: E402

import variants  # noqa: E402
from config import ExperimentConfig  # noqa: E402
from lowmem.devices import device_bytes  # noqa: E402
from lowmem.plan_verdict import CPU, judge  # noqa: E402
from run_outcome import SUMMARY_KEYS  # noqa: E402


def plan_trainer(config: ExperimentConfig, stage) -> dict:
    """Peaks of `config.steps` optimizer steps of the trainer of `stage`.

    Raises:
        KernelWithoutFake: if the trainer reaches a kernel whose memory is not known.
        ValueError: as in experiments/train.py.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import trainers
    from data import load_tokenizer, model_config
    from lowmem.dry_run import DryRun

    start = time.perf_counter()
    tokenizer = load_tokenizer(config)
    shape = model_config(config, tokenizer)
    # The run must be as long as the longest: a token that ends no sequence and that the tokenizer gives back
    word = next(i for i in tokenizer("a")["input_ids"] if i not in tokenizer.all_special_ids)

    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())
    record = {"summary": dict.fromkeys(SUMMARY_KEYS)}
    with tempfile.TemporaryDirectory() as folder, weights_from_shape():
        shape.architectures = [AutoModelForCausalLM._model_mapping[type(shape)].__name__]
        shape.save_pretrained(folder)
        original, trainers.model_path = trainers.model_path, lambda *_: folder
        try:
            with DryRun(sampled_token_id=word) as dry:
                train(replace(config, budget_gib=None, count_live_bytes=True), stage, record)
        finally:
            trainers.model_path = original
    summary = record["summary"]
    kept = ("live_peak_bytes", "live_peak_phase", "live_peak_bytes_by_phase")
    return {name: summary[name] for name in kept} | {
        "num_ops": dry.num_ops,
        "parameters": parameters,
        "wall_s": time.perf_counter() - start,
        "tokens": {key: record["tokens"][key] for key in ("prompt_tokens_per_row", "completion_tokens_per_row")},
    }


@contextlib.contextmanager
def weights_from_shape():
    """`from_pretrained` makes the model of the folder's config; there is no weight to read."""
    import torch
    from transformers import AutoConfig, PreTrainedModel

    original = PreTrainedModel.from_pretrained

    def from_config(cls, path, *args, config=None, dtype=None, **kwargs):
        config = config or AutoConfig.from_pretrained(path)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return cls._from_config(config, dtype=dtype or torch.float32).eval()

    PreTrainedModel.from_pretrained = classmethod(from_config)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="name or size: adds a verdict (kernels of the CPU all the same)")
    args, settings = parser.parse_known_args(argv)
    try:
        device = device_bytes(args.device) if args.device else None
        config, stage = parse_config(settings)
        figures = plan_trainer(config, stage)
        if device:
            figures["verdict"] = asdict(judge(figures["live_peak_bytes"], device, CPU))
    except (ValueError, RuntimeError, NotImplementedError, OSError, variants.load_fork().ForkError) as error:
        print(f"plan_trainer.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
