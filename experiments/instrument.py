"""Watches one training run from inside, without a line in the trainer: phases, step times, live bytes, and what the
model was really given to generate from."""

import time
from collections import defaultdict

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback

from lowmem.live_bytes import LiveBytes
from memory_samples import mark_phase

PHASES = ("generate", "score", "train_forward", "train_backward", "optimizer", "other")


class RunWatch(TrainerCallback):
    """Phases of a run and what happened in them.

    Attributes:
        meter: the `LiveBytes` of the run, or None if live bytes are not counted.
        phase_time_s: seconds spent in each phase.
        step_phase_time_s: the same, of each optimizer step.
        step_time_s: seconds of each optimizer step, generation and scoring included.
        metrics: what the trainer logged, one dict per step.
        prompts, completions: token ids per generated row of the first step, padding removed.
    """

    def __init__(self, steps: int, meter: LiveBytes | None, pad_token_id: int):
        self.steps, self.meter, self.pad_token_id = steps, meter, pad_token_id
        self.step = 0
        self.phase = "other"
        self.phase_time_s: dict[str, float] = defaultdict(float)
        self.step_time_s: list[float] = []
        self.step_phase_time_s: list[dict[str, float]] = []
        self.metrics: list[dict] = []
        self.prompts: list[list[int]] = []
        self.completions: list[list[int]] = []
        self.all_prompts: list[list[int]] = []
        self._phase_time_before_step_s: dict[str, float] = {}
        self._phase_start = self._step_start = time.perf_counter()

    def enter(self, phase: str) -> None:
        """Ends the current phase and starts `phase`."""
        if phase == self.phase:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.phase_time_s[self.phase] += now - self._phase_start
        self.phase, self._phase_start = phase, now
        if self.meter is not None:
            self.meter.phase = phase
        mark_phase(phase, self.step + 1, self.steps)

    def watch(self, policy: torch.nn.Module, ref_policy: torch.nn.Module | None, accelerator) -> None:
        """Hooks the phases into the model's forward, `generate`, the accelerator's backward and the optimizer."""
        generate, backward = policy.generate, accelerator.backward

        def watched_generate(*args, **kwargs):
            self.enter("generate")
            output = generate(*args, **kwargs)
            self._note_rows(kwargs["input_ids"], kwargs["attention_mask"], output)
            self.enter("other")
            return output

        def watched_backward(*args, **kwargs):
            self.enter("train_backward")
            backward(*args, **kwargs)

        def before_forward(module, args, kwargs):
            if kwargs.get("use_cache"):  # a prompt's prefill, before `generate` goes on from it
                self.enter("generate")
            elif self.phase != "generate":
                self.enter("train_forward" if torch.is_grad_enabled() else "score")

        policy.generate, accelerator.backward = watched_generate, watched_backward
        for model in (policy, ref_policy):
            if model is not None:
                # On the backbone: the fused heads call it without the model's own __call__.
                model.base_model.register_forward_pre_hook(before_forward, with_kwargs=True)
        register_optimizer_step_pre_hook(lambda *_: self.enter("optimizer"))
        register_optimizer_step_post_hook(lambda *_: self.enter("other"))

    def on_train_begin(self, *args, **kwargs):
        self._step_start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.enter("other")
        now = time.perf_counter()
        self.step_time_s.append(now - self._step_start)
        before = self._phase_time_before_step_s
        self.step_phase_time_s.append({name: t - before.get(name, 0.0) for name, t in self.phase_time_s.items()})
        self._phase_time_before_step_s = dict(self.phase_time_s)
        self.step, self._step_start = self.step + 1, now

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.metrics.append({key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))})

    def _note_rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, output) -> None:
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask)]
        self.all_prompts += rows
        if self.step == 0:
            self.prompts += rows
            for ids in sequences[:, input_ids.shape[1] :].tolist():
                while ids and ids[-1] == self.pad_token_id:  # a finished row is padded until the longest ends
                    ids.pop()
                self.completions.append(ids)


def check_prompts(
    seen: list[list[int]], expected: list[list[int]], rows_per_step: int, rloo_k: int, tiled: bool
) -> dict:
    """Compares the prompts that the model was given with the data set's.

    Args:
        seen: token ids of every generated row.
        expected: token ids of every prompt of the data set, not truncated.
        tiled: whether rows of one group stand `rows_per_step // rloo_k` apart (v0.20.0) or side by side (v1.16.0).

    Returns:
        `prompts_changed`, rows whose ids are not those of a prompt; `groups_mixed`, groups of the leave-one-out
        baseline with more than one prompt; `expected_prompt_tokens_per_row`, lengths before any change (None where
        the prompt is not recognised).
    """
    whole = {tuple(ids): len(ids) for ids in expected}
    by_start = {tuple(ids[:8]): len(ids) for ids in expected}  # a cut prompt keeps its beginning ...
    by_end = {tuple(ids[-8:]): len(ids) for ids in expected}  # ... or its end
    keys = [tuple(ids) for ids in seen]
    lengths = [whole.get(key) or by_start.get(key[:8]) or by_end.get(key[-8:]) for key in keys]
    groups_mixed = 0
    for start in range(0, len(keys) - rows_per_step + 1, rows_per_step):
        step = keys[start : start + rows_per_step]
        prompts = rows_per_step // rloo_k
        for group in range(prompts):
            rows = step[group::prompts] if tiled else step[group * rloo_k : (group + 1) * rloo_k]
            groups_mixed += len(set(rows)) > 1
    return {
        "prompts_changed": sum(key not in whole for key in keys),
        "groups_mixed": groups_mixed,
        "expected_prompt_tokens_per_row": lengths[:rows_per_step],
    }
