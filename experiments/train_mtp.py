"""Trains a small model with several prediction heads and writes one JSON record, on failure too.

    python experiments/train_mtp.py --config experiments/configs/mtp/learning.yaml --pipeline rho1 --loss hidden

One loop for all pipelines and all ways to compute the loss; every setting of experiments/mtp_config.py is an option
and a YAML key. Exit status: 0 ok, 1 error, 2 bad settings, 3 out of memory.
"""

import datetime
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from train import environment, lift_budget, limit_memory, write_record  # noqa: E402

from memory_samples import status_kib  # noqa: E402
from mtp_config import MtpConfig, library_sha256, parse_config  # noqa: E402
from run_outcome import EXIT_CODES, OUT_OF_MEMORY, SUMMARY_KEYS  # noqa: E402


def train(config: MtpConfig, record: dict) -> None:
    """Runs the training and fills `record`; raises what the training raises."""
    import torch

    from lowmem.live_bytes import LiveBytes
    from mtp_data import batches, collate, encode, load_mtp_tokenizer, load_rows
    from mtp_losses import loss_and_gradients, validate
    from mtp_model import MtpModel
    from mtp_weights import make_weigh

    tokenizer = load_mtp_tokenizer(config)
    vocab_size = config.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size is {vocab_size}, less than the tokenizer's {len(tokenizer)}")
    rows, held_out = (encode(some, tokenizer, config.max_tokens) for some in load_rows(config))
    held_out = [row for row in held_out if row["reward"] == 1]
    if not held_out:
        raise ValueError("no validation row has reward 1; raise validation_rows or look at the data set's rewards")
    summary, log = record["summary"], {}
    record["env"]["threads"] = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_default_device(device)
    summary["rss_start_bytes"] = status_kib("VmRSS") * 1024
    if config.budget_gib is not None:
        limit_memory(config.budget_gib)

    weigh = make_weigh(config, rows, tokenizer, vocab_size, log)
    torch.manual_seed(config.seed)
    model = MtpModel(config, vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    meter = LiveBytes() if config.count_live_bytes else None
    if meter is not None:
        meter.track(model.parameters())
    steps, validations, step_time_s, tokens, shapes = [], [], [], [], []

    parts = [held_out[i : i + config.batch_size] for i in range(0, len(held_out), config.batch_size)]
    parts = [collate(part, tokenizer.pad_token_id) for part in parts]

    def loop() -> None:
        if config.validate_every <= config.steps:
            validations.append({"step": 0} | validate(config, model, parts))
        data = batches(rows, config.batch_size, config.steps, tokenizer.pad_token_id, config.seed)
        for step, batch in enumerate(data, start=1):
            start = time.perf_counter()
            tokens.append(batch["attention_mask"].sum().item())
            shapes.append(list(batch["labels"].shape))
            losses = loss_and_gradients(config, model, batch, weigh)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
            optimizer.step()
            optimizer.zero_grad()
            steps.append({name: value.item() for name, value in losses.items()} | {"grad_norm": norm})
            step_time_s.append(time.perf_counter() - start)
            last = step == config.steps and config.validate_every <= config.steps
            if step % config.validate_every == 0 or last:
                validations.append({"step": step} | validate(config, model, parts))

    try:
        if meter is None:
            loop()
        else:
            with meter:
                loop()
    finally:
        summary |= {
            "rss_peak_bytes": status_kib("VmHWM") * 1024,
            "step_time_s": step_time_s,
            "step_time_median_s": statistics.median(step_time_s[1:]) if len(step_time_s) > 1 else None,
            "metrics": steps,
            "validations": validations,
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": vocab_size,
            "validation_rows": len(held_out),
            "training_rows_of_reward_1": sum(row["reward"] == 1 for row in rows),
            "training_rows": len(rows),
            **log,
        }
        if meter is not None:
            summary["live_peak_bytes"] = meter.peak_bytes
        if device == "cuda":
            summary["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            summary["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        record["tokens"] = {"tokens_per_step": tokens, "batch_shapes": shapes}
    if not all(abs(step["weighted"]) < float("inf") for step in steps):
        raise RuntimeError("a loss is not finite; lower learning_rate")


def main(argv: list[str]) -> int:
    started, start = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    try:
        config = parse_config(argv)
    except (ValueError, OSError) as error:
        print(f"train_mtp.py: {error}", file=sys.stderr)
        return 2
    path = Path(config.record or HERE.parent / f"results/runs/local/mtp/{config.workload}/{config.run_name}.json")
    record = {
        "schema": 1,
        "run": f"{config.workload}/{path.stem}",
        "status": "ok",
        "error": None,
        "command": ["python", "experiments/train_mtp.py", *argv],
        "config": asdict(config),
        "env": environment(),
        "seed": config.seed,
        "started_at": started.isoformat(timespec="seconds"),
        "wall_s": None,
        "tokens": None,
        "summary": dict.fromkeys(SUMMARY_KEYS),
    }
    record["env"]["mtp_sha256"] = library_sha256()
    try:
        train(config, record)
    except Exception as error:  # the outcome is recorded, whatever it is
        lift_budget()
        text = f"{type(error).__name__}: {error}"
        record["status"] = "oom" if OUT_OF_MEMORY.search(text) else "error"
        record["error"] = " ".join(text.split())[:1000]
        traceback.print_exc()
        print(f"train_mtp.py: {record['error']}", file=sys.stderr)
    lift_budget()
    record["wall_s"] = time.perf_counter() - start
    write_record(path, record)
    last = (record["summary"].get("validations") or [{}])[-1]
    print(f"train_mtp.py: {record['status']}, acceptance {last.get('acceptance')}, record in {path}")
    return EXIT_CODES[record["status"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
