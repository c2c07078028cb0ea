"""The examples of the README and of docs/shared_prefix.md run as they stand, on a small model."""

import os
import subprocess
import sys

import torch
from conftest import ROOT
from test_shared_prefix_models import VOCAB_SIZE, gradients, make_model, worst_relative_error


def example(page: str, heading: str) -> str:
    """The first Python block under a heading."""
    return (ROOT / page).read_text().split(f"\n{heading}\n")[1].split("```python\n")[1].split("```")[0]


def test_the_script_of_the_readme_trains(probe_model, tmp_path):
    code = example("README.md", "## Use it")
    assert '"Qwen/Qwen3-0.6B"' in code
    code = f"texts = {[f'The number {n} is' for n in range(4)]}\n" + code.replace(
        '"Qwen/Qwen3-0.6B"', f'"{probe_model}"'
    )
    code = code.replace('output_dir="out"', 'output_dir="out", use_cpu=True')
    code += "assert trainer.state.global_step == 3, trainer.state\n"
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'trl/v1.16.0/src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_loop_of_the_docs_has_the_gradients_of_plain_rows():
    torch.manual_seed(0)
    model = make_model("qwen3", torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 5], 0
    model.generation_config.top_k, model.generation_config.repetition_penalty = 3, 1.5  # not what is asked for
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :4] = 0
    names = {"torch": torch, "model": model, "input_ids": input_ids, "attention_mask": attention_mask}
    names["advantages"] = torch.randn(16)
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.0)  # leaves the weights for the comparison
    exec(example("docs/shared_prefix.md", "## In a loop of your own"), names)
    assert names["groups"][1].prompt_ids.tolist() == input_ids[1, 4:].tolist()
    assert len(set(names["lengths"])) > 2
    ends = [[i for i, token in enumerate(ids.tolist()) if token in (2, 5)] for ids in names["completions"]]
    assert all(end in ([], [len(ids) - 1]) for end, ids in zip(ends, names["completions"], strict=True))
    assert {int(ids[-1]) for ids in names["completions"]} >= {2, 5}
    assert len({int(token) for ids in names["completions"] for token in ids}) > 40, "a few likely tokens were sampled"
    ours = gradients(model)

    sums = []
    for group in names["groups"]:
        for completion in group.completions:
            ids = torch.cat([group.prompt_ids, completion])[None]
            logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1] / 0.7
            sums.append(logits.log_softmax(-1).gather(-1, completion[:, None]).sum())
    sums = torch.stack(sums)
    torch.testing.assert_close(names["old_logps"].sum(1), sums.detach(), rtol=1e-5, atol=1e-4)
    loss = -(names["advantages"] * (sums - sums.detach()).exp()).mean()
    loss.backward()
    torch.testing.assert_close(names["loss"], loss.detach(), rtol=0, atol=1e-4)
    assert worst_relative_error(ours, gradients(model)) < 1e-5
