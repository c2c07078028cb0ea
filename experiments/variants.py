"""The variants that are measured, and the fork tree that each of them runs.

A process uses one tree: `activate` puts it on the path before TRL is imported, and refuses when TRL has already come
from somewhere else.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# variant -> (pin, stage); stage "0" is upstream, "tip" the whole patch series
VARIANTS = {
    "baseline": ("v0.20.0", "0"),
    "as-published": ("v0.20.0", "as-published"),
    "string-level": ("v0.20.0", "tip"),
    "upstream": ("v1.16.0", "0"),
    "shared-prefix": ("v1.16.0", "tip"),
    "memory": ("v1.16.0", "tip"),  # the same tree, flags off but those of the `memory` section
}
ONE_ROW = "-mb1"  # suffix: the same tree with one row per micro-batch, as a user short of memory would set it


def load_fork():
    """The module `trl/fork.py`, which is not importable by name because `trl` is the package it builds."""
    if "lowmem_fork" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lowmem_fork", ROOT / "trl" / "fork.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["lowmem_fork"] = module
        spec.loader.exec_module(module)
    return sys.modules["lowmem_fork"]


def loaded_lowmem() -> list[str]:
    """Files of the library that this process has imported: what decides the memory and the time of a patched tree."""
    return sorted(
        Path(module.__file__).name for name, module in list(sys.modules.items()) if name.partition(".")[0] == "lowmem"
    )


def lowmem_sha256(files: Iterable[str]) -> dict[str, str | None]:
    """Hash by file of the library's source; None for a file that is not there."""
    paths = {name: ROOT / "lowmem" / name for name in files}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.exists() else None for n, p in paths.items()}


def lowmem_changed(recorded: dict[str, str] | None) -> bool:
    """Whether the library's files that a run used are not what they were; `recorded` is its `lowmem_sha256`."""
    return not isinstance(recorded, dict) or lowmem_sha256(recorded) != recorded


def split_variant(variant: str) -> tuple[str, str]:
    """`(pin, stage name)` of a variant. `string-level@3` is the series up to its third patch, `upstream-mb1` the
    variant with one row per micro-batch.

    Raises:
        ValueError: if the name is unknown.
    """
    name, at, stage = variant.removesuffix(ONE_ROW).partition("@")
    if name not in VARIANTS or (at and not stage.isdigit()):
        raise ValueError(
            f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}, string-level@N for the first N patches, and "
            f"any of them with {ONE_ROW} for one row per micro-batch"
        )
    pin, tip = VARIANTS[name]
    return pin, stage or tip


def tree_of(variant: str):
    """The built stage (`fork.Stage`) of a variant. Raises `fork.ForkError` if it is not built or out of date."""
    pin, stage = split_variant(variant)
    return load_fork().stage(pin, stage)


def activate(variant: str):
    """Puts the variant's tree first on the path and returns it (`fork.Stage`).

    Raises:
        RuntimeError: if TRL was already imported from another place: two trees in one process would mix.
    """
    stage = tree_of(variant)
    loaded = getattr(sys.modules.get("trl"), "__file__", None)
    if loaded and Path(loaded).resolve().parent.parent != stage.path.resolve():
        raise RuntimeError(
            f"this process has already imported TRL from {Path(loaded).parent.parent}, and {variant!r} needs "
            f"{stage.path}. Two trees cannot be mixed in one process: start a fresh one for every variant."
        )
    sys.path[:] = [str(stage.path)] + [p for p in sys.path if p != str(stage.path)]
    spec = importlib.util.find_spec("trl")
    if Path(spec.origin).resolve().parent.parent != stage.path.resolve():
        raise RuntimeError(f"`import trl` finds {spec.origin}, not {stage.path}: remove that TRL from the path first.")
    return stage
