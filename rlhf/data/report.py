"""What data preparation tells its user: progress, counts by reason, and how long the texts are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

_LONGEST = 1 << 16


class LengthCounts:
    """How many texts there are of each length: a count for each length, however many texts."""

    def __init__(self) -> None:
        self.counts: dict[str, np.ndarray] = {}

    def add(self, lengths: Mapping[str, list[int]]) -> None:
        for name, values in lengths.items():
            counts = self.counts.setdefault(name, np.zeros(_LONGEST, dtype=np.int64))
            counts += np.bincount(np.minimum(values, _LONGEST - 1), minlength=_LONGEST)

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, median, 95th percentile and maximum, in tokens."""
        return {name: _summary(counts) for name, counts in self.counts.items() if counts.any()}

    def plot(self, path: Path, title: str, limits: Mapping[str, int | None]) -> None:
        """Write a histogram for each kind of text as PNG, with its limit as a line."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = [name for name, counts in self.counts.items() if counts.any()]
        figure = Figure(figsize=(5.5 * max(len(names), 1), 3.8), layout="constrained")
        for place, name in enumerate(names, start=1):
            axes = figure.add_subplot(1, len(names), place)
            counts, limit = self.counts[name], limits.get(name)
            shown = max(int(np.flatnonzero(counts)[-1]), limit or 0) + 1
            width = max(1, -(-shown // 60))
            edges = np.arange(0, shown + width, width)
            heights = np.add.reduceat(np.append(counts[: edges[-1]], 0), edges[:-1])
            axes.bar(edges[:-1], heights, width=width, align="edge", color="#4c72b0", edgecolor="white", linewidth=0.3)
            if limit is not None:
                over = int(counts[limit + 1 :].sum())
                label = f"limit {limit}: {over:,} over ({100 * over / counts.sum():.1f} %)"
                axes.axvline(limit + 1, color="#c44e52", label=label)
                axes.legend(frameon=False, fontsize=9)
            stats = _summary(counts)
            axes.set_title(
                f"{name}: mean {stats['mean']:.0f}, median {stats['p50']}, 95 % {stats['p95']}, max {stats['max']}",
                fontsize=9,
            )
            axes.set_xlabel("tokens")
            axes.set_ylabel(f"{name}s")
            axes.set_xlim(0, edges[-1])
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=10)
        FigureCanvasAgg(figure).print_png(str(path))


class Progress:
    """A bar over the bytes (files) or rows (hub) that were read; a line now and then where there is no terminal."""

    def __init__(self, total: int, unit: str) -> None:
        self.rows = self.tokens = 0
        self._bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            desc="tokenising",
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            delay=0.0 if sys.stderr.isatty() else 15.0,
            file=sys.stderr,
        )

    def update(self, progress: int, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens
        self._bar.set_postfix_str(f"{self.rows:,} rows, {self.tokens:,} tokens", refresh=False)
        self._bar.update(progress)

    def close(self) -> None:
        self._bar.close()


def counts_table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows kept and dropped, by split and by reason, with percentages of all.

    >>> print(counts_table({"train": {"kept": 3, "dropped": {"too long": 1}, "cut": {}}}))
    rows              train
    kept                  3  75.0 %
    dropped               1  25.0 %
      too long            1  25.0 %
    """
    splits = list(counts)
    reasons = sorted({reason for split in splits for reason in counts[split]["dropped"]})
    cuts = sorted({name for split in splits for name in counts[split]["cut"]})
    lines = [("kept", [counts[split]["kept"] for split in splits])]
    lines.append(("dropped", [sum(counts[split]["dropped"].values()) for split in splits]))
    total = sum(map(sum, (values for _, values in lines)))
    lines += [(f"  {reason}", [counts[s]["dropped"].get(reason, 0) for s in splits]) for reason in reasons]
    lines += [(f"{name}, kept", [counts[s]["cut"].get(name, 0) for s in splits]) for name in cuts]
    width = max(10, *(len(name) for name, _ in lines)) + 1
    table = ["rows".ljust(width) + "".join(f"{split:>12}" for split in splits)]
    for name, values in lines:
        share = f"{100 * sum(values) / max(total, 1):6.1f} %"
        table.append(name.ljust(width) + "".join(f"{value:>12,}" for value in values) + share)
    return "\n".join(table)


def _summary(counts: np.ndarray) -> dict[str, float]:
    total = np.cumsum(counts)
    at = {f"p{p}": int(np.searchsorted(total, total[-1] * p / 100)) for p in (50, 95)}
    mean = float(np.dot(counts, np.arange(len(counts))) / total[-1])
    return {"mean": round(mean, 1), **at, "max": int(np.flatnonzero(counts)[-1])}
