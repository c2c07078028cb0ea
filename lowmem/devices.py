"""Memory of devices by name, as their makers state it. Nothing else is known of them here."""

import re

GIB = 2**30

# GiB. Makers write "GB" for it, but for the H200, whose 141 are decimal. Inference cards with GDDR6 keep 1/16 of it
# for error correction, which is taken off. A card's own figure (nvidia-smi) is better: give it as a size.
MEMORY_GIB = {
    "RTX 2080 Ti": 11,
    "RTX 3060": 12,
    "RTX 3090": 24,
    "RTX 4060 Ti 16GB": 16,
    "RTX 4080": 16,
    "RTX 4090": 24,
    "RTX 5080": 16,
    "RTX 5090": 32,
    "RTX A6000": 48,
    "RTX 6000 Ada": 48,
    "T4": 15,
    "V100 16GB": 16,
    "V100 32GB": 32,
    "A10": 22.5,
    "A40": 45,
    "A100 40GB": 40,
    "A100": 80,
    "L4": 22.5,
    "L40S": 45,
    "H100": 80,
    "H200": 131,
    "B200": 180,
}


def device_bytes(device: str) -> int:
    """Bytes of a device given by name (`RTX 3090`, `rtx3090`, `NVIDIA A100-SXM4-80GB`) or size (`24`, `24GiB`,
    `24 GB`, `800MiB`).

    Raises:
        ValueError: for an unknown name, or a size that is not above 0.
    """
    folded = re.sub(r"(?<=.)[-_]|\s", "", device.lower())
    folded = re.sub("^(nvidia|tesla|geforce)+", "", folded)
    folded = re.sub(r"(sxm\d?|pcie)(?=\d+gb$)|hbm\d\w?$", "", folded)  # as nvidia-smi adds them
    for name, size in MEMORY_GIB.items():
        short = name.lower().replace(" ", "")
        if folded in (short, short.removesuffix("gb"), f"{short}{size}gb"):
            return int(size * GIB)
    number, scale = folded, GIB
    for unit, factor in (("mib", 2**20), ("mb", 2**20), ("gib", GIB), ("gb", GIB), ("g", GIB)):
        if folded.endswith(unit):
            number, scale = folded.removesuffix(unit), factor
            break
    try:
        size = float(number)
    except ValueError:
        raise ValueError(
            f"the device {device!r} is unknown; give its memory as in 24GiB, or one of {', '.join(MEMORY_GIB)}"
        ) from None
    if not 0 < size < float("inf"):
        raise ValueError(f"a device of {device!r} has no memory; give a size above 0, as in 24GiB")
    return int(size * scale)
