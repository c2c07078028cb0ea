"""Where the figures of a recorded table come from, in one line below its title."""

import datetime
import subprocess

import torch
from torchrun import ROOT


def origin(script: str, device: str) -> str:
    """torch, device, number of runs, date, commit and the script, for a table of single runs."""
    git = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    version = torch.__version__.partition("+")[0]
    return f"torch {version} · {device} · n = 1 · {datetime.date.today()} · commit {git.stdout.strip()} · {script}"
