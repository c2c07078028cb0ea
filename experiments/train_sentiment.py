"""The sentiment recipe: trains a small model to continue "I feel so" with a happy word, by PPO, RLOO or GRPO.

    python experiments/train_sentiment.py --config experiments/configs/sentiment/learns.yaml
    python experiments/train_sentiment.py --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --load_in_bits 4

Every setting of experiments/sentiment/config.py is an option and a YAML key. The output folder gets the adapter (or
the whole model with --save_merged True) and its tokenizer, the curve, the record, and while the training runs a
checkpoint from which the same command goes on after a kill. Exit status: 0 ok, 1 error, 2 bad settings, 3 out of
memory.
"""

import datetime
import gc
import importlib
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from train import environment, write_record  # noqa: E402

import variants  # noqa: E402  (the tree has to be chosen before anything imports TRL)
from memory_samples import status_kib, write_atomically  # noqa: E402
from run_outcome import EXIT_CODES, OUT_OF_MEMORY, SUMMARY_KEYS  # noqa: E402
from sentiment.config import TREES, SentimentConfig  # noqa: E402

CHECKPOINT = "checkpoint.safetensors"


def parse_config(argv: list[str]):
    """`(config, stage)`. The algorithm, or `tree`, decides which fork tree's `TrlParser` reads the rest."""
    if argv.count("--config") > 1:  # the parser would read the first alone
        raise ValueError("--config was given twice; put the settings into one file, or give them as options")
    chosen = {}
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            import yaml

            try:
                chosen |= yaml.safe_load(Path(argv[position + 1]).read_text()) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"{argv[position + 1]} is not valid YAML: {' '.join(str(error).split())}") from error
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--algorithm", "--tree"):
            chosen[name[2:]] = value if equals else argv[position + 1] if position + 1 < len(argv) else None
    algorithm = chosen.get("algorithm", SentimentConfig.algorithm)
    stage = variants.activate(chosen.get("tree") or TREES.get(algorithm, TREES["ppo"]))
    from trl import TrlParser

    (config,) = TrlParser(SentimentConfig, allow_abbrev=False).parse_args_and_config(argv)
    if config.algorithm != algorithm:  # read twice, and the first reading chose the tree
        raise ValueError(f"the algorithm {config.algorithm!r} was not given as --algorithm; write it in full")
    needed = variants.split_variant(TREES[config.algorithm])[0]
    if stage.pin != needed:
        raise ValueError(f"{config.algorithm} runs on {needed}, and the tree {config.tree!r} is {stage.pin}")
    if config.algorithm == "ppo" and not (stage.name.isdigit() and int(stage.name) >= 6):
        raise ValueError(f"PPO takes a reward function from patch 6 on, and the tree {config.tree!r} has fewer")
    return config, stage


def load_reward(config: SentimentConfig):
    """`(reward function, its name)`."""
    if config.reward is None:
        from sentiment.reward import word_reward

        return word_reward(config.target_words), "of the target words"
    module_name, _, function_name = config.reward.rpartition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name), config.reward
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"unknown reward {config.reward!r} ({error}); give module:function") from error


def train(config: SentimentConfig, stage, record: dict) -> None:
    """Judges, trains, judges again, saves, and fills `record`; raises what the training raises."""
    import torch
    from transformers import TrainerCallback, logging

    from instrument import RunWatch
    from lowmem.live_bytes import LiveBytes
    from sentiment import checkpoint, models
    from sentiment.progress import Progress, judge
    from sentiment.trainers import build_trainer

    logging.set_verbosity_error()
    out, settings = Path(config.output_dir), asdict(config)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / CHECKPOINT
    header = None
    if kept.exists() and not config.restart:
        header = checkpoint.read_header(kept, settings)
    source = models.model_source(config)
    tokenizer = models.load_tokenizer(source)
    progress = Progress(config, *load_reward(config))
    if header:
        progress.resume(header["seen"])
    done = header["batches_done"] if header else 0
    built = build_trainer(config, stage, source, tokenizer, progress, done)
    trainer, policy, reference, value_model, base_sha256 = built
    if config.lora_dropout and config.lora_rank and config.algorithm != "grpo":
        print(
            f"lora_dropout {config.lora_dropout} has no effect: the trainer turns all dropout off, so that old and "
            "new log-probabilities are those of one model"
        )
    before = header["seen"]["before"] if header else judge(policy, None, tokenizer, config)
    show_samples("before", before)

    steps_per_batch = config.ppo_epochs if config.algorithm == "grpo" else 1  # as the trainer counts them

    class Checkpoints(TrainerCallback):
        waiting = header is not None

        def _restore(self):
            if self.waiting:
                self.waiting = False
                checkpoint.restore(kept, trainer, header)
                print(f"going on after {done} of {config.batches} batches")

        def on_train_begin(self, *args, **kwargs):
            if config.algorithm != "grpo":
                self._restore()

        def on_step_begin(self, *args, **kwargs):  # v1.16.0 alone calls it, after its loader drew a random number
            self._restore()

        def on_log(self, args, state, *_, **kwargs):  # behind Progress, which puts the logged KL into the history
            batches = len(progress.history)
            if state.global_step % steps_per_batch or batches >= config.batches:
                return
            if config.checkpoint_steps and batches % config.checkpoint_steps == 0:
                checkpoint.save_checkpoint(kept, trainer, batches, settings, progress.seen | {"before": before})

    trainer.add_callback(Checkpoints())
    meter = LiveBytes() if config.count_live_bytes else None
    watch = RunWatch(config.batches, meter, tokenizer.pad_token_id)
    watch.step = done
    trainer.add_callback(watch)
    trained = trainer.model.policy if config.algorithm == "ppo" else policy
    watch.watch(trained, None if config.lora_rank else reference, trainer.accelerator)
    if value_model is not None:
        watch_value_model(watch, value_model)
    summary = record["summary"]
    summary["rss_start_bytes"] = status_kib("VmRSS") * 1024
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gc.freeze()  # v0.20.0 collects garbage twice per batch; the thousands of imported objects need no visit
    start, processor_start = time.perf_counter(), time.process_time()
    try:
        if meter is None:
            trainer.train()
        else:
            for module in filter(None, (policy, None if config.lora_rank else reference, value_model)):
                meter.track(module.parameters())
                meter.track(module.buffers())
            with meter:
                trainer.train()
    finally:
        watch.enter("other")
        progress.bar.close()
        summary |= {
            "train_s": time.perf_counter() - start,
            "train_processor_s": time.process_time() - processor_start,
            "rss_peak_bytes": status_kib("VmHWM") * 1024,
            "threads": torch.get_num_threads(),
            "step_time_s": watch.step_time_s,
            "phase_time_s": dict(watch.phase_time_s),
            "history": progress.history,
            "discovered": progress.discovered,
            "before": before,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "trained_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
            "value_model": value_model and value_model_cost(value_model, trainer.optimizer),
            "batches_done_before": done,
        }
        if meter is not None:
            summary |= {
                "live_peak_bytes": meter.peak_bytes,
                "live_peak_phase": meter.peak_phase,
                "live_peak_bytes_by_phase": meter.peak_bytes_by_phase,
            }
        if torch.cuda.is_available():
            summary["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            summary["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        record["tokens"] = {
            "prompt_tokens_per_row": [len(ids) for ids in watch.prompts],
            "completion_tokens_per_row": [len(ids) for ids in watch.completions],
            "rows_per_step": config.batch_size,
        }
    if len(progress.history) != config.batches:
        raise RuntimeError(f"{len(progress.history)} of {config.batches} batches were made")
    after = judge(policy, reference, tokenizer, config)
    summary["after"] = after
    show_samples("after", after)
    save_model(config, policy, tokenizer, source, base_sha256)
    positives, samples = (sum(entry[key] for entry in progress.history) for key in ("positives", "samples"))
    print(
        f"\ntraining: {config.batches} batches, {positives} of {samples} samples positive "
        f"({positives / samples:.1%})\n"
        f"success rate: {before['success_rate']:.1%} untrained, {after['success_rate']:.1%} trained "
        f"(n = {after['samples']} each)\n"
        f"KL to the untrained model: {after['kl']:.2f} +- {after['kl_se']:.2f} nats per completion\n"
        f"different completions: {before['distinct']} before, {after['distinct']} after\n"
        f"target words after: {after['words']}\n"
        f"the model is in {out}"
    )
    kept.unlink(missing_ok=True)


def watch_value_model(watch, value_model) -> None:
    """Marks the forwards of PPO's value model as phases of their own: `value_score` and `value_forward`."""
    import torch

    backbone = getattr(value_model, value_model.base_model_prefix)
    backbone.register_forward_pre_hook(
        lambda *_: watch.enter("value_forward" if torch.is_grad_enabled() else "value_score")
    )
    backbone.register_forward_hook(lambda *_: watch.enter("other"))


def value_model_cost(value_model, optimizer) -> dict:
    """Bytes that PPO holds for its value model all the time: weights, their gradients' largest size, AdamW's state."""
    trained = [p for p in value_model.parameters() if p.requires_grad]
    moments = [state for p in trained for state in optimizer.state.get(p, {}).values()]
    return {
        "parameters": sum(p.numel() for p in value_model.parameters()),
        "trained_parameters": sum(p.numel() for p in trained),
        "weight_bytes": sum(p.numel() * p.element_size() for p in value_model.parameters()),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trained),
        "optimizer_bytes": sum(value.numel() * value.element_size() for value in moments if hasattr(value, "numel")),
    }


def show_samples(when: str, judged: dict) -> None:
    print(f"\n=== samples {when}: {judged['success_rate']:.1%} positive, {judged['distinct']} of {judged['samples']} "
          "different ===")  # fmt: skip
    for prompt, completions in judged["examples"].items():
        for completion in completions:
            print(f"  {prompt}|{completion}")


def save_model(config: SentimentConfig, policy, tokenizer, source: str, base_sha256: str) -> None:
    """The adapter, or with `save_merged` the whole model, as safetensors with the tokenizer."""
    from sentiment.models import FINGERPRINT

    out = Path(config.output_dir)
    if config.lora_rank and not config.save_merged:
        policy.save_pretrained(out, selected_adapters=["default"])
        write_atomically(out / FINGERPRINT, json.dumps({"source": source, "sha256": base_sha256}, indent=1) + "\n")
    else:
        for name in ("adapter_config.json", "adapter_model.safetensors", FINGERPRINT):
            (out / name).unlink(missing_ok=True)  # of an earlier run: it would be put on top of the merged model
        whole = policy.merge_and_unload() if config.lora_rank else policy
        whole.__dict__.pop("forward", None)  # the head for chunked log-probabilities
        whole.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str]) -> int:
    started, start = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    try:
        config, stage = parse_config(argv)
        load_reward(config)
    except (ValueError, RuntimeError, OSError, variants.load_fork().ForkError) as error:
        print(f"train_sentiment.py: {error}", file=sys.stderr)
        return 2
    path = Path(config.record or Path(config.output_dir) / "record.json")
    record = {
        "schema": 1,
        "run": f"sentiment/{path.stem}",
        "status": "ok",
        "error": None,
        "command": ["python", "experiments/train_sentiment.py", *argv],
        "config": asdict(config),
        "env": environment(stage),
        "seed": config.seed,
        "started_at": started.isoformat(timespec="seconds"),
        "wall_s": None,
        "tokens": None,
        "summary": dict.fromkeys(SUMMARY_KEYS),
    }
    try:
        train(config, stage, record)
    except Exception as error:  # the outcome is recorded, whatever it is
        text = f"{type(error).__name__}: {error}"
        record["status"] = "oom" if OUT_OF_MEMORY.search(text) else "error"
        record["error"] = " ".join(text.split())[:1000]
        traceback.print_exc()
        print(f"train_sentiment.py: {record['error']}", file=sys.stderr)
    record["env"]["lowmem_sha256"] = variants.lowmem_sha256(variants.loaded_lowmem())
    record["wall_s"] = time.perf_counter() - start
    write_record(path, record)
    if record["status"] == "ok":
        from visualization.sentiment_charts import draw_curve

        print(f"curve: {draw_curve(record, Path(config.output_dir) / 'curve.png')}")
    print(f"train_sentiment.py: {record['status']}, record in {path}")
    return EXIT_CODES[record["status"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
