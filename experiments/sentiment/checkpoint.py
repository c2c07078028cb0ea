"""A checkpoint of a PPO, RLOO or GRPO training in one safetensors file, and the way back into the trainer.

v0.20.0's trainers cannot go on from a checkpoint by themselves, and v1.16.0's writes pickles. Here a file holds all
that the rest of the run depends on: trained weights (the value model's too), AdamW's moments and step counts, the
states of the three random number generators, and, as JSON in the header, the number of finished batches with what was
seen so far. It replaces its predecessor in one rename, so a kill leaves the old one or the new one.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

NOT_COMPARED = (
    "output_dir",
    "record",
    "restart",
    "save_merged",
    "checkpoint_steps",
    "samples_per_prompt",
    "count_live_bytes",
)


def _trained(trainer) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def save_checkpoint(path: Path, trainer, batches_done: int, settings: dict, seen: dict) -> None:
    tensors, optimizer = {}, trainer.optimizer
    for name, parameter in _trained(trainer).items():
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    tensors["rng/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state()
    header = {
        "batches_done": batches_done,
        "settings": settings,
        "seen": seen,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, partial, {"run": json.dumps(header)})
    os.replace(partial, path)


def read_header(path: Path, settings: dict) -> dict:
    """`batches_done`, `seen` and the generators' states of a checkpoint.

    Raises:
        ValueError: if it belongs to other settings, with the first that differs.
    """
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["run"])
    for name, value in settings.items():
        if name not in NOT_COMPARED and header["settings"].get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"{path} is the checkpoint of a run with {name} = {header['settings'].get(name)!r}, now it is "
                f"{value!r}; give the old setting, another output_dir, or --restart True"
            )
    return header


def restore(path: Path, trainer, header: dict) -> None:
    """Puts weights, optimizer and random number generators back; to be called when the training begins."""
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        trained = _trained(trainer)
        saved = {key.split("/")[1] for key in keys if key.startswith("weight/")}
        if saved != set(trained):
            raise ValueError(f"{path} holds {len(saved)} trained tensors, the model has {len(trained)} others")
        for name, parameter in trained.items():
            parameter.data.copy_(file.get_tensor(f"weight/{name}"))
        for name, parameter in trained.items():
            prefix = f"optimizer/{name}/"
            state = {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
            if state:  # the step count stays on the CPU, where AdamW made it
                trainer.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
        torch.set_rng_state(file.get_tensor("rng/torch"))
    kind, words, *rest = header["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
    version, internal, gauss = header["python"]
    random.setstate((version, tuple(internal), gauss))
