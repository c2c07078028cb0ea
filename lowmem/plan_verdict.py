"""Does it fit: the simulated peak, what a simulation cannot see, and the device.

What the simulation does not see are lines of their own, each with its source. On a GPU they are leads from public
reports and not measurements of this project; `calibrate` replaces them by those of the user's card.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

GIB = 2**30
FITS, TIGHT, NO = "fits", "tight", "does not fit"


@dataclass
class Unseen:
    """Memory beside the tensors.

    Attributes:
        fixed_bytes: context, loaded kernels, workspaces.
        fraction: of the peak: blocks that the allocator holds and cannot use, and temporary memory inside kernels.
        total_fraction: of the device, that its driver keeps.
        source: where the figures come from.
    """

    fixed_bytes: int
    fraction: float
    total_fraction: float
    source: str


CUDA = Unseen(
    int(0.7 * GIB),
    0.08,
    0.03,
    "not measured here: context and kernels about 0.3 to 0.8 GB (pytorch issue 34323); reserved over allocated "
    "+1 to +26 %, median 8 % in replays of 11 simulated traces",
)
CPU = Unseen(64 * 2**20, 0.02, 0.0, "measured on CPU: results/planner/validation.csv")


@dataclass
class Verdict:
    verdict: str
    device_bytes: int
    usable_bytes: int
    peak_bytes: int
    unseen_bytes: int
    needed_bytes: int
    source: str

    @property
    def margin_bytes(self) -> int:
        """What is left beyond what is needed; negative where it does not fit."""
        return self.usable_bytes - self.needed_bytes


def judge(peak_bytes: int, device_bytes: int, unseen: Unseen) -> Verdict:
    """`fits` if the peak and all that is unseen is below what the device gives, `tight` if the tensors alone with the
    fixed part are, else `does not fit`."""
    usable = int(device_bytes * (1 - unseen.total_fraction))
    extra = unseen.fixed_bytes + int(peak_bytes * unseen.fraction)
    if peak_bytes + extra <= usable:
        verdict = FITS
    elif peak_bytes + unseen.fixed_bytes <= usable:
        verdict = TIGHT
    else:
        verdict = NO
    return Verdict(verdict, device_bytes, usable, peak_bytes, extra, peak_bytes + extra, unseen.source)


def largest_peak(device_bytes: int, unseen: Unseen) -> int:
    """The largest simulated peak that still gets the verdict `fits`."""
    return int((device_bytes * (1 - unseen.total_fraction) - unseen.fixed_bytes) / (1 + unseen.fraction))


def device_needed(peak_bytes: int, unseen: Unseen) -> int:
    """The smallest device on which this peak gets the verdict `fits`."""
    return int((peak_bytes * (1 + unseen.fraction) + unseen.fixed_bytes) / (1 - unseen.total_fraction)) + 1


def load_calibration(path: Path | str) -> Unseen:
    """The figures that `calibrate` wrote on a GPU.

    Raises:
        ValueError: if the file is not one of these.
    """
    try:
        return Unseen(**json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no calibration ({error}); write one with --calibrate on the GPU") from None


@dataclass
class Readings:
    """What a device says after one executed step, and what was predicted for it.

    Attributes:
        total_bytes, free_bytes: of the device, after the step; nothing else may run on it.
        reserved_bytes: what the allocator still holds.
        peak_reserved_bytes: the most that it held.
        predicted_bytes: the simulated peak of the step.
    """

    device: str
    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int
    predicted_bytes: int


def calibrated(readings: Readings) -> Unseen:
    """What the simulation did not see: beside the allocator, in the allocator, and between the size of the device as
    it is sold (whole GiB) and what it has."""
    beside = readings.total_bytes - readings.free_bytes - readings.reserved_bytes
    sold = -(-readings.total_bytes // GIB) * GIB
    return Unseen(
        max(beside, 0),
        max(readings.peak_reserved_bytes / readings.predicted_bytes - 1, 0.0),
        1 - readings.total_bytes / sold,
        f"calibrated on {readings.device}",
    )


def cuda_readings() -> Readings:
    """Executes one small training step on the GPU.

    Raises:
        ValueError: without a CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--calibrate needs a CUDA device, and PyTorch finds none; plan without it, or run it there")
    from lowmem.plan_config import PlanConfig
    from lowmem.plan_step import execute, simulate

    plan = PlanConfig(method="sft", dtype="bfloat16", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    predicted = simulate(plan, cuda=True).peak_bytes
    execute(plan, device="cuda")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    return Readings(torch.cuda.get_device_name(0), total, free, reserved, peak, predicted)


def calibrate(path: Path | str, read: Callable[[], Readings] = cuda_readings) -> Unseen:
    """Writes what a simulation cannot see on this machine's device, for `load_calibration`."""
    unseen = calibrated(read())
    Path(path).write_text(json.dumps(asdict(unseen), indent=1) + "\n")
    return unseen
