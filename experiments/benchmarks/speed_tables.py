"""The tables of the speed benchmark, as Markdown, from what speed.py saves."""

from __future__ import annotations

import json
import statistics
from typing import Any

MEDIANS = ("seconds", "samples_per_second", "tokens_per_second", "share", "peak_bytes", "loaded_bytes")


def summary_of(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the runs of each side, and of each other side the ratios to ours.

    `least` and `most` are of two runs that followed one another, for a side with as many runs as ours.

    >>> run = dict.fromkeys(MEDIANS, 1.0)
    >>> ours, peer = [run, {**run, "seconds": 3.0}], [{**run, "seconds": 4.0}, {**run, "seconds": 6.0}]
    >>> summary_of({"ours": ours, "peer": peer})["peer"]["ratio"]
    {'seconds': 2.5, 'peak_bytes': 1.0, 'least': 2.0, 'most': 4.0}
    >>> summary_of({"ours": ours, "peer": peer[:1]})["peer"]["ratio"]
    {'seconds': 2.0, 'peak_bytes': 1.0}
    """
    summary: dict[str, Any] = {
        side: {name: statistics.median(r[name] for r in runs) for name in MEDIANS}
        for side, runs in sides.items()
        if runs
    }
    ours = summary["ours"]
    for side, runs in sides.items():
        if side == "ours" or not runs:
            continue
        ratio = {name: summary[side][name] / ours[name] for name in ("seconds", "peak_bytes")}
        if len(runs) == len(sides["ours"]):
            ratios = [p["seconds"] / o["seconds"] for o, p in zip(sides["ours"], runs, strict=True)]
            ratio.update(least=min(ratios), most=max(ratios))
        summary[side]["ratio"] = ratio
    return summary


def stage_table(results: dict[str, Any], stages: list[str]) -> str:
    """A table of these stages, then what both sides were set to and what else the peer was tried at."""
    lines = [
        "| stage | side | s a step | over ours (pairs of runs) | samples/s | tokens/s | peak GB (loaded) | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in stages:
        for side, found in results["stages"][stage]["summary"].items():
            ratio, shown = found.get("ratio"), ""
            if ratio is not None:
                spread = f" ({ratio['least']:.2f}-{ratio['most']:.2f})" if "least" in ratio else ""
                shown = f"{ratio['seconds']:.2f}{spread}"
            lines.append(
                f"| {stage} | {side} | {found['seconds']:.3f} | {shown} | {found['samples_per_second']:.2f} "
                f"| {found['tokens_per_second']:,.0f} | {found['peak_bytes'] / 1e9:.2f} "
                f"({found['loaded_bytes'] / 1e9:.2f}) | {100 * found['share']:.1f} % |"
            )
    for stage in stages:
        found = results["stages"][stage]
        lines.append(f"\n{stage}: rows {found['order']}")
        lines += [f"- {side}: {_shown(found['settings'][side])}" for side in ("ours", "peer")]
        for trial in found["peer_trials"]:
            what = (
                f"{trial['seconds']:.3f} s a step" if "seconds" in trial else f"failed ({_last_line(trial['failed'])})"
            )
            lines.append(f"- peer tried at {_shown(trial['settings'])}: {what}")
    machine = results["machine"]
    runs = [run for stage in stages for runs in results["stages"][stage]["runs"].values() for run in runs]
    rates = [run["matmul_flops_per_second"] / 1e12 for run in runs]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines.append(
        f"\n{machine['cpu']}, {machine['threads']} threads; {results['precision']}; matrix products at "
        f"{statistics.median(rates):.3f} TFLOP/s ({min(rates):.3f}-{max(rates):.3f} over the runs); "
        f"{versions}{', PPO beside trl 1.12.0' if 'ppo' in stages else ''}"
    )
    return "\n".join(lines)


def scaling_table(answer: dict[str, Any]) -> str:
    """Cost of a distinct token as a micro-batch, and as the responses to a prompt, grow; beside it its arithmetic.

    Tokens are real, a prompt's counted once. One of a response is more work than one of a prompt: it has logits, and
    more keys before it. Below the table: how far each series is from constant, that is from half its extremes' sum.
    """
    lines = [
        "| what grows | tokens a micro-batch | us a token | to the cheapest | its FLOPs, to the least | share |",
        "|---|---|---|---|---|---|",
    ]
    names = {"rows": "pairs", "responses": "responses to a prompt", "scored": "the same, scored"}
    around = []
    for series, name in names.items():
        cases = [case for case in answer["cases"] if case["series"] == series]
        costs = [statistics.median(case["seconds"]) / case["work"]["tokens"] for case in cases]
        work = [case["flops"] / case["work"]["tokens"] for case in cases]
        for case, cost, flops in zip(cases, costs, work, strict=True):
            share = flops / cost / answer["matmul_flops_per_second"]
            lines.append(
                f"| {name}, {case['factor']}{'x' if series == 'rows' else ''} "
                f"| {case['work']['tokens'] / case['micro_batches']:,.0f} | {1e6 * cost:.0f} "
                f"| {cost / min(costs):.2f} | {flops / min(work):.2f} | {100 * share:.0f} % |"
            )
        around.append(f"{name} {100 * (max(costs) - min(costs)) / (max(costs) + min(costs)):.0f} %")
    return "\n".join(lines) + f"\n\nFrom a constant: {', '.join(around)}."


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:120] if text.strip() else "nothing said"
