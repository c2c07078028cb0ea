"""Two ways to draw a long recording as a short line: one keeps every peak exactly, the other shows only the trend."""

import numpy as np
import pandas as pd


def peak_preserving(series: pd.Series, window: int) -> pd.Series:
    """The largest sample of every `window` samples, at its own time; the first and the last sample stay too.

    Every drawn point is a recorded one, so the drawn peak equals the recorded peak at the time it was recorded, which
    a mean over the window does not. What lies between two peaks (a valley shorter than the window) is lost.

    `series`: values indexed by time, missing samples left out. `window`: samples per drawn point, at least 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}, it must be at least 1")
    recorded = series.dropna()
    if recorded.empty:
        return recorded
    values = recorded.to_numpy()
    starts = range(0, len(values), window)
    peaks = [start + int(np.argmax(values[start : start + window])) for start in starts]
    kept = sorted({0, *peaks, len(values) - 1})
    return recorded.iloc[kept]


def trend(series: pd.Series, window: int) -> pd.Series:
    """The mean of the `window` samples around each sample (fewer at the ends): it lowers every peak."""
    if window < 1:
        raise ValueError(f"window is {window}, it must be at least 1")
    return series.dropna().rolling(window, center=True, min_periods=1).mean()
