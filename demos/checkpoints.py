"""Which models a demo can talk to: the checkpoints of experiments, what those started from, and the data's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.splits import data_info
from rlhf.errors import UserError
from rlhf.models.adapters import adapter_base, adapter_has_head
from rlhf.models.loading import resolve
from rlhf.untrusted import read_json

FLAG = "experiment_dir"


@dataclass(frozen=True)
class Checkpoint:
    """One model to choose on the page.

    Attributes:
        label: its name on the page.
        source: a model folder, or a hub id.
        format: the `format` entry of the data that its experiment was trained on; None where none is recorded.
    """

    label: str
    source: str
    format: Mapping[str, Any] | None = field(default=None, compare=False)


def find_checkpoints(sources: Sequence[str]) -> list[Checkpoint]:
    """The models behind experiment folders, model folders and hub ids: first their own, then what they started from.

    An experiment gives `final`, the best checkpoint and the others from the newest to the oldest. Its start (the
    experiment or model that its `args.json` names) is followed back to the pretrained model, and is talked to in the
    same format, so that the answers compare.

    Raises:
        UserError: a source that holds no model, or a reward model.
    """
    names = _names(sources)
    listed = [checkpoint for source in sources for checkpoint in _own(source, names[source])]
    for source in sources:
        if _is_experiment(Path(source)):
            listed += _starts(Path(source), names[source], recorded_format(source))
    found: dict[str, Checkpoint] = {}
    for checkpoint in listed:
        found.setdefault(_identity(checkpoint.source), checkpoint)
    return list(found.values())


def recorded_format(folder: str | Path) -> Mapping[str, Any] | None:
    """How the prompts of an experiment's data are written; None where the folder says nothing of its data.

    It stands in the experiment's `data.json`, else in the `args.json` of its `--data_dir`.
    """
    info = _read_json(Path(folder) / "data.json")
    data_dir = _read_json(Path(folder) / "args.json").get("data_dir")
    if not info.get("stages") and isinstance(data_dir, str):
        info = data_info(data_dir)
    stages = info.get("stages")
    entries = stages.values() if isinstance(stages, dict) else ()
    formats = [entry.get("format") for entry in entries if isinstance(entry, dict)]
    return next((format for format in formats if format and isinstance(format, dict)), None)


def _own(source: str, name: str) -> list[Checkpoint]:
    path = Path(source)
    if not _is_experiment(path):
        folder = resolve(source, FLAG)
        _refuse_reward_model(folder, source)
        # A model folder may be one of an experiment's: <experiment>/final, <experiment>/checkpoints/<which>/model.
        around = next((p for p in list(path.resolve().parents)[:3] if path.exists() and _is_experiment(p)), None)
        return [Checkpoint(name, folder, recorded_format(around) if around else None)]
    folders = list(_folders(path)) or [("final", Path(resolve(source, FLAG)))]
    _refuse_reward_model(str(folders[0][1]), source)
    format = recorded_format(path)
    return [Checkpoint(f"{name} · {which}", str(folder), format) for which, folder in folders]


def _folders(experiment: Path) -> Iterator[tuple[str, Path]]:
    """(what it is, model folder) of every checkpoint that is there."""
    checkpoints = experiment / "checkpoints"
    candidates = [("final", experiment / "final"), (_best_label(checkpoints / "best"), checkpoints / "best" / "model")]
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        candidates.append((f"step {folder.name.removeprefix('step-').lstrip('0') or '0'}", folder / "model"))
    return (candidate for candidate in candidates if _is_model(candidate[1]))


def _best_label(folder: Path) -> str:
    record = _read_json(folder / "best.json")
    try:
        return f"best (step {record['step']:d}, {record['metric']} {record['value']:.3g})" if record else "best"
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'best.json'} lacks step, metric or value; restore it, or remove {folder}") from None


def _starts(
    experiment: Path, name: str, format: Mapping[str, Any] | None, seen: tuple[Path, ...] = ()
) -> Iterator[Checkpoint]:
    """What an experiment started from, and what that started from; `seen`: where this path has come through."""
    args = _read_json(experiment / "args.json")
    start = args.get("sft_experiment_dir") or args.get("model_name")
    if not isinstance(start, str) or not start or "\0" in start or experiment.resolve() in seen:
        return
    path = _found(start, experiment)
    try:
        folder = resolve(str(path) if path else start, "sft_experiment_dir")
    except UserError:
        print(f"note: {start}, which {name} started from, is no longer there; it is left out", flush=True)
        return
    if path is not None and _is_experiment(path):
        yield Checkpoint(f"{path.name} · final, the start of {name}", folder, format)
        yield from _starts(path, path.name, format, (*seen, experiment.resolve()))
    else:
        yield Checkpoint(f"{path.name if path else start} · pretrained, the start of {name}", folder, format)


def _found(start: str, experiment: Path) -> Path | None:
    """`start` as seen from here, or from a folder above the experiment (where the run may have been started)."""
    places = (Path(start), *(parent / start for parent in experiment.resolve().parents))
    return next((place for place in places if place.exists()), None)


def _names(sources: Sequence[str]) -> dict[str, str]:
    """Short names on the page: the last part of a path, or all of it where two would be alike."""
    short = {source: Path(source).resolve().name if Path(source).exists() else source for source in sources}
    alike = [name for name in short.values() if list(short.values()).count(name) > 1]
    return {source: source if name in alike else name for source, name in short.items()}


def _refuse_reward_model(folder: str, source: str) -> None:
    architectures = str(_read_json(Path(folder) / "config.json").get("architectures"))
    is_adapter = adapter_base(folder) is not None
    if "SequenceClassification" in architectures or (is_adapter and adapter_has_head(folder)):
        raise UserError(
            f"--{FLAG}={source} holds a reward model, which gives scores and no text; give an experiment of "
            f"rlhf_sft.py, rlhf_ppo.py or rlhf_dpo.py"
        )


def _is_experiment(path: Path) -> bool:
    return (path / "args.json").is_file() and not _is_model(path)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def _identity(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        return read_json(path, "restore it, or give another experiment", constants=True)
    except FileNotFoundError:
        return {}
