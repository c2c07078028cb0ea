"""Peak memory of a shared-prefix step does not depend on the number of completions, and nothing stays behind."""

import pytest
import torch
from test_shared_prefix_models import make_groups, make_model

from lowmem.live_bytes import LiveBytes
from lowmem.shared_prefix import shared_prefix_backward
from lowmem.shared_prefix_prompt import SharedPrompt, _PromptLayer


def train_step_peak_bytes(num_completions: int, *, checkpointing: bool, shared: bool) -> int:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 211}
    model = make_model("qwen3", torch.float32, **sizes)
    if checkpointing:
        model.activation_checkpointing_enable()
    group = make_groups([(64, (48,) * num_completions)])[0]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    meter = LiveBytes()
    meter.track([*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())])
    meter.track([group.prompt_ids, *group.completions])
    bytes_before = meter.live_bytes
    rows = torch.stack([torch.cat([group.prompt_ids, ids]) for ids in group.completions])
    with meter:
        if shared:
            shared_prefix_backward(model, [group], lambda s: s.logps.mean(), max_branches=1, self_check=False)
        else:
            model(input_ids=rows).logits.log_softmax(-1).mean().backward()
    assert meter.live_bytes - bytes_before < 4096, "something of the step is still alive"
    return meter.peak_bytes - bytes_before


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_peak_memory_does_not_depend_on_the_number_of_completions(checkpointing):
    peaks = {k: train_step_peak_bytes(k, checkpointing=checkpointing, shared=True) for k in (2, 16)}
    print(peaks, peaks[16] / peaks[2])
    assert peaks[16] / peaks[2] <= 1.05


def test_peak_memory_of_the_plain_way_grows_with_the_number_of_completions():
    peaks = {k: train_step_peak_bytes(k, checkpointing=False, shared=False) for k in (2, 16)}
    assert peaks[16] / peaks[2] > 4


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_block_that_fails_leaves_no_graph_behind(checkpointing):
    model, group = make_model("qwen3", torch.float32), make_groups()[0]
    if checkpointing:
        model.activation_checkpointing_enable()
    meter = LiveBytes()
    meter.track([*model.parameters(), *model.buffers()])
    bytes_before = meter.live_bytes
    with meter:
        with pytest.raises(KeyError), SharedPrompt(model, group.prompt_ids):
            raise KeyError
    assert meter.live_bytes - bytes_before < 1024


def test_a_replay_keeps_the_first_keys_and_values():
    layer, first, replayed = _PromptLayer(), torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    assert layer.update(first, first) == (first, first)
    assert layer.take() == (first, first)
    assert layer.update(replayed, replayed) == (replayed, replayed)
    assert layer.take() == (None, None)
    assert (layer.get_seq_length(), layer.get_mask_sizes(5)) == (0, (5, 0))
