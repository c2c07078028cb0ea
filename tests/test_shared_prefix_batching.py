"""Continuous batching of transformers with `shared_prefix=True`: every prompt once, with `num_return_sequences=k`.

It draws its random numbers in the order in which requests are served, so sampled tokens cannot be compared one by one.
Compared: greedy tokens of every row of real training steps with upstream's duplicates (the order of the rows), the
tokens that run through the model (every prompt once), and that the completions of a prompt differ when sampled.

Run as a script, this file trains both trainers with and without the flag and prints what was seen.
"""

import json
import os
import subprocess
import sys
import tempfile

import pytest
from test_shared_prefix_rloo import ROOT

NUM_GENERATIONS, COMPLETION_TOKENS = 3, 5
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "num_generations_eval": 2}


def train(
    algorithm: str, folder: str, prompts: list[str], shared_prefix: bool, steps=1, evaluation=None, **generation_kwargs
) -> dict:
    """Rows `[prompt, completion]` of every generation, and the tokens that it ran through the model."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trl

    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer_class = getattr(trl, f"{algorithm}Trainer")
    seen = {"rows": [], "forward_tokens": []}

    class Watched(trainer_class):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            num_tokens = 0

            def count(module, hook_args, hook_kwargs):
                nonlocal num_tokens
                num_tokens += hook_kwargs["input_ids"].numel()

            hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            hook.remove()
            completions = result[0] if isinstance(result, tuple) else result
            seen["rows"].append([list(row) for row in zip(prompt_ids, completions, strict=True)])
            seen["forward_tokens"].append(num_tokens)
            return result

    Watched(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=getattr(trl, f"{algorithm}Config")(
            output_dir=tempfile.mkdtemp(),
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={"max_memory_percent": 0.02, "max_batch_tokens": 1024},
            generation_kwargs=generation_kwargs,
            shared_prefix=shared_prefix,
            num_generations=NUM_GENERATIONS,
            max_completion_length=COMPLETION_TOKENS,
            per_device_train_batch_size=len(prompts) * NUM_GENERATIONS,
            max_steps=steps,
            beta=0.1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **(evaluation or {}),
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    ).train()
    return seen


def print_runs(folder: str) -> None:
    sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]
    import variants

    variants.activate("shared-prefix")
    prompts = ["one two three four five six seven eight", "nine ten"]
    runs = {}
    for algorithm in ("RLOO", "GRPO"):
        runs[algorithm] = {
            "duplicates": train(algorithm, folder, prompts, False, steps=2, do_sample=False),
            "shared": train(algorithm, folder, prompts, True, steps=2, do_sample=False),
            "sampled": train(algorithm, folder, prompts, True),
            "one token": train(algorithm, folder, ["a", "one two"], True, do_sample=False),
            "evaluation": train(algorithm, folder, prompts, True, evaluation=EVALUATION, do_sample=False),
        }
    print(json.dumps(runs))


def print_missing(folder: str) -> None:
    """What is raised when the engine returns fewer completions, or those of another prompt."""
    sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]
    import variants

    variants.activate("shared-prefix")
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching.requests import GenerationOutput
    from trl.trainer.utils import generate_batch_by_group

    class Engine:
        def __init__(self, outputs):
            self.outputs = {str(number): output for number, output in enumerate(outputs)}

        def generate_batch(self, inputs, generation_config, **kwargs):
            return self.outputs

    def outputs(*prompts, **kwargs):
        return [GenerationOutput(request_id="", prompt_ids=ids, generated_tokens=[7], **kwargs) for ids in prompts]

    a, b = [1, 2], [3, 4, 5]
    cases = {
        "complete": outputs(a, a, b, b),
        "missing": outputs(a, b, b),
        "another order": outputs(a, b, a, b),
        "failed": outputs(a, a, b) + outputs(b, error="out of blocks"),
    }
    messages = {}
    for case, returned in cases.items():
        try:
            generate_batch_by_group(Engine(returned), [a, a, b, b], 2, generation_config=GenerationConfig())
            messages[case] = None
        except Exception as error:
            messages[case] = f"{type(error).__name__}: {error}"
    print(json.dumps(messages))


# --- tests -----------------------------------------------------------------------------------------------------------


def run_this(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(probe_model) -> dict:
    return run_this("--runs", str(probe_model))


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_greedy_rows_of_the_first_generation_equal_those_of_duplicates(runs, algorithm):
    """The second generation follows an update, where rounding may decide: its prompts are compared."""
    shared, duplicates = runs[algorithm]["shared"], runs[algorithm]["duplicates"]
    assert shared["rows"][0] == duplicates["rows"][0]
    for ours, theirs in zip(shared["rows"], duplicates["rows"], strict=True):
        assert [prompt for prompt, _ in ours] == [prompt for prompt, _ in theirs]
        assert all(completion for _, completion in ours)
    prompts = {tuple(prompt): tuple(completion) for prompt, completion in shared["rows"][0]}
    assert len(set(prompts.values())) == len(prompts) == 2, "the prompts cannot be told apart by their completions"


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_every_prompt_runs_once(runs, algorithm):
    """All prompt tokens but the last, once per prompt in place of k times. The engine's warm-up is in both counts."""
    shared, duplicates = runs[algorithm]["shared"], runs[algorithm]["duplicates"]
    prompts = [prompt for prompt, _ in shared["rows"][0]][::NUM_GENERATIONS]
    saved = (NUM_GENERATIONS - 1) * sum(len(prompt) - 1 for prompt in prompts)
    assert duplicates["forward_tokens"][0] - shared["forward_tokens"][0] == saved > 0


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_completions_of_a_prompt_are_sampled_each_for_itself(runs, algorithm):
    rows = runs[algorithm]["sampled"]["rows"][0]
    for first in range(0, len(rows), NUM_GENERATIONS):
        group = rows[first : first + NUM_GENERATIONS]
        assert len({tuple(prompt) for prompt, _ in group}) == 1
        assert len({tuple(completion) for _, completion in group}) == NUM_GENERATIONS


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_prompts_of_one_token_are_sent_as_upstream_sends_them(runs, algorithm):
    rows = runs[algorithm]["one token"]["rows"][0]
    assert 1 in {len(prompt) for prompt, _ in rows}
    assert len(rows) == 2 * NUM_GENERATIONS and all(completion for _, completion in rows)


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_evaluation_has_groups_of_its_own_size(runs, algorithm):
    """A prompt per batch. Generation leaves the mode of the model as it was, or the second batch would be training."""
    training, *evaluation = runs[algorithm]["evaluation"]["rows"]
    assert len(training) == 2 * NUM_GENERATIONS
    assert [len({tuple(prompt) for prompt, _ in rows}) for rows in evaluation] == [1, 1]
    assert [len(rows) for rows in evaluation] == [EVALUATION["num_generations_eval"]] * 2


def test_completions_that_do_not_fit_their_prompts_are_refused():
    messages = run_this("--missing", "")
    assert messages.pop("complete") is None
    for case, message in messages.items():
        assert message.startswith("RuntimeError: `generate_batch` returned"), case
    assert "out of blocks" in messages["failed"]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    {"--runs": print_runs, "--missing": print_missing}[sys.argv[1]](sys.argv[2])
