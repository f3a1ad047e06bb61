"""The whole of a data preparation: read, tokenise, divide, write. The scripts of data_prep/ add only the parser.

Rows stream from the reader through the tokenising processes to a spool of flat token files; a few numbers for each
row decide its split and place; the splits are then written from the spool, packed twin first, and the `.pt` from
the twin. So memory grows by some forty bytes a row, whatever the length of the texts. Everything is written in a
folder beside `--destination_dir` and comes in at the end, all at once: a run that fails, or is killed, changes nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.encode import Encoded, Limits, RowEncoder, encode_all
from rlhf.data.exchange import write_pt
from rlhf.data.formats import format_of
from rlhf.data.packed import SPLIT_NAMES
from rlhf.data.prepare_flags import PrepareFlags, check_flags
from rlhf.data.report import LengthCounts, Progress, counts_table
from rlhf.data.rows import Row
from rlhf.data.sources import CHUNK_ROWS, Source, choose_splits, open_sources
from rlhf.data.splits import data_info
from rlhf.data.spool import Selection, Spool, SpooledRows, select
from rlhf.data.text import load_tokenizer, tokenizer_fingerprint
from rlhf.data.twin import open_twin, stamp_twin, write_twin
from rlhf.errors import UserError
from rlhf.files import write_json, writing
from rlhf.merge import alone, discard, put_in, staging
from rlhf.paths import check_writable

_POOL_PAYS_BYTES = 4 << 20
_EARLY_CHECK_ROWS = 1000

Parse = Callable[[Any], Row]


@dataclass
class _Tally:
    """What is counted over all sources while rows stream by."""

    lengths: LengthCounts = dataclasses.field(default_factory=LengthCounts)
    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    boundary: tuple[int, int] = (0, 0)
    examples: dict[str, tuple[int, str, list[int]]] = dataclasses.field(default_factory=dict)
    num_read: int = 0
    num_bad: int = 0
    num_skipped: int = 0
    num_tokens: int = 0
    first_bad: dict[str, Any] | None = None
    files: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Of each file: rows read, and rows broken."""


def prepare(
    flags: PrepareFlags,
    make_parser: Callable[[PreTrainedTokenizerBase], Parse],
    *,
    sample: Path | None = None,
    prompt_template: str = "{prompt}",
    made: Source | None = None,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Prepare one stage; `make_parser(tokenizer)` gives what turns a source row into a `Row`.

    Args:
        sample: the file that `--dataset_path=sample` stands for.
        prompt_template: around plain prompts, for `args.json`.
        made: rows that the script makes itself, in place of a data set.
        arguments: for `args.json`, where they are others than `flags`.

    Returns:
        The stage's entry in `args.json`.

    Raises:
        UserError: a flag, source, tokenizer or row that can't be used; nothing is written then.
        WriteError: the disk has no room; what was there is as it was.
    """
    check_flags(flags)
    destination = Path(flags.destination_dir).expanduser()
    check_writable(destination, "destination_dir")
    data_info(destination)  # an unreadable args.json is better found now than after the work
    tokenizer = load_tokenizer(flags.tokenizer_name, trust_remote_code=flags.trust_remote_code)
    sources = {"train": made} if made else _open_sources(flags, sample)
    limits = Limits(flags.max_length, flags.max_prompt_length, flags.max_response_length, flags.truncate)
    encoder = RowEncoder(flags.stage, tokenizer, make_parser(tokenizer), limits, flags.seed)
    started = time.perf_counter()
    try:
        folder = destination.resolve()
        work = staging(folder)
    except OSError as error:
        raise UserError(f"--destination_dir {destination} can't be written ({error.strerror})") from error
    try:
        with writing(destination):
            tally = _Tally()
            num_workers = _num_workers(flags, sources)
            spooled = _encode_sources(flags, encoder, sources, work, tally, num_workers)
            shares = {"validation": flags.validation_percentage, "test": flags.test_percentage}
            selections = select(
                spooled,
                {name: share for name, share in shares.items() if name not in sources},
                remove_same_inputs=flags.remove_same_inputs,
                shuffle=flags.shuffle,
                seed=flags.seed,
            )
            counts = {name: selection.counts() for name, selection in selections.items()}
            print(counts_table(counts))
            if not len(selections["train"].index):
                raise UserError(_nothing_left(flags, counts, tally))
            out = work / "out"
            out.mkdir()
            files = _write_splits(out, flags, selections)
            files |= _write_extras(out, work, flags, tally, selections)
            seconds = time.perf_counter() - started
            kind = tally.kinds.most_common(1)[0][0]
            entry = {
                "arguments": arguments or dataclasses.asdict(flags),
                "tokenizer": {"name": flags.tokenizer_name, "fingerprint": tokenizer_fingerprint(tokenizer)},
                "format": format_of(kind, tokenizer, prompt_template),
                "counts": counts,
                "bad_rows": tally.num_bad,
                "boundary": {"checked": tally.boundary[0], "differ": tally.boundary[1]},
                "lengths": tally.lengths.summary(),
                "files": files,
            }
            _put_in(folder, out, flags.stage, entry)
    finally:
        discard(work)
    _print_end(destination, tally, seconds, num_workers)
    return entry


def _open_sources(flags: PrepareFlags, sample: Path | None) -> dict[str, Source]:
    found = open_sources(_local_path(flags, sample), flags.dataset_name or "", flags.dataset_subset)
    return choose_splits(found, {name: getattr(flags, f"{name}_split") for name in SPLIT_NAMES})


def _local_path(flags: PrepareFlags, sample: Path | None) -> str | None:
    if flags.dataset_path != "sample":
        return flags.dataset_path
    if sample is None or not sample.exists():
        raise UserError("--dataset_path sample: this script comes with no sample; give a file or folder")
    return str(sample)


def _num_workers(flags: PrepareFlags, sources: dict[str, Source]) -> int:
    if flags.num_workers:
        return flags.num_workers
    if flags.limit is not None and flags.limit <= CHUNK_ROWS:
        return 1
    size = sum(source.total * (1 if source.files else 1000) for source in sources.values())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if size > _POOL_PAYS_BYTES else 1


def _encode_sources(
    flags: PrepareFlags,
    encoder: RowEncoder,
    sources: dict[str, Source],
    work: Path,
    tally: _Tally,
    num_workers: int,
) -> dict[str, SpooledRows]:
    """Stream every source through the encoder into its spool; stop at too many broken rows."""
    unit = "B" if any(source.files for source in sources.values()) else "rows"
    progress = Progress(sum(source.total for source in sources.values()), unit)
    spooled = {}
    try:
        with open(work / "skipped.jsonl", "w", encoding="utf-8") as skipped:
            for name, source in sources.items():
                spool = Spool(work, flags.stage, name)
                try:
                    for encoded in encode_all(encoder, source.chunks(flags.limit), num_workers):
                        spool.add(encoded)
                        for row in encoded.skipped:
                            skipped.write(json.dumps(row, ensure_ascii=False) + "\n")
                        _count(flags, name, encoded, tally)
                        progress.update(encoded.progress, encoded.num_read, encoded.num_tokens)
                finally:
                    spool.close()
                spooled[name] = spool.finish()
    finally:
        progress.close()
    _stop_if_bad(flags, tally)
    for file, (num_read, num_bad) in tally.files.items():
        if num_read == num_bad > 0 and len(tally.files) > 1:
            raise UserError(f"none of the {num_read:,} rows of {file} can be used; mend the file or take it away")
    return spooled


def _count(flags: PrepareFlags, source: str, encoded: Encoded, tally: _Tally) -> None:
    bad = [row for row in encoded.skipped if row["bad"]]
    if bad and flags.on_bad_row == "error":
        raise UserError(_place(bad[0]) + ", or pass --on_bad_row=skip")
    tally.first_bad = tally.first_bad or (bad[0] if bad else None)
    of_file = tally.files.setdefault(encoded.file, [0, 0])
    of_file[0] += encoded.num_read
    of_file[1] += len(bad)
    tally.num_bad += len(bad)
    tally.num_skipped += len(encoded.skipped)
    tally.num_read += encoded.num_read
    tally.num_tokens += encoded.num_tokens
    tally.kinds += encoded.kinds
    tally.lengths.add(encoded.lengths)
    tally.boundary = tuple(a + b for a, b in zip(tally.boundary, encoded.boundary, strict=True))
    if encoded.example and encoded.example < tally.examples.get(source, (2**64,)):
        tally.examples[source] = encoded.example
    if tally.num_read >= _EARLY_CHECK_ROWS:
        _stop_if_bad(flags, tally)


def _stop_if_bad(flags: PrepareFlags, tally: _Tally) -> None:
    if tally.num_bad > flags.max_bad_fraction * tally.num_read:
        raise UserError(
            f"{tally.num_bad:,} of the first {tally.num_read:,} rows are broken, more than "
            f"--max_bad_fraction={flags.max_bad_fraction} allows; mend them, or raise it; the first is "
            f"{_place(tally.first_bad)}"
        )


def _place(row: dict[str, Any]) -> str:
    return f"{row['file']}:{row['line']}: {row['reason']}; {row['fix']}"


def _nothing_left(flags: PrepareFlags, counts: dict[str, dict], tally: _Tally) -> str:
    if not tally.num_read:
        return f"{flags.dataset_path or flags.dataset_name} holds no rows; give data that does"
    reasons: collections.Counter = collections.Counter()
    for split in counts.values():
        reasons.update(split["dropped"])
    why = ", ".join(f"{n:,} x {reason}" for reason, n in reasons.most_common(3))
    first = f"; the first broken row is {_place(tally.first_bad)}" if tally.first_bad else ""
    left = f"none of the {tally.num_read:,} rows is left to train on with --stage={flags.stage} ({why})"
    return f"{left}; raise the limits, or mend the rows{first}"


def _write_splits(out: Path, flags: PrepareFlags, selections: dict[str, Selection]) -> dict[str, dict]:
    files = {}
    for name, selection in selections.items():
        if not len(selection.index):
            continue
        twin, pt = (out / f"{flags.stage}_{name}{suffix}" for suffix in (".safetensors", ".pt"))
        rows, index = selection.source.rows, selection.index
        fingerprint = write_twin(twin, flags.stage, rows.lengths(index), rows.blocks(index))
        write_pt(pt, open_twin(twin).rows, ignore_index=flags.ignore_index)
        stamp_twin(twin, pt)
        files[pt.name] = {"rows": len(selection.index), "fingerprint": fingerprint}
    return files


def _write_extras(
    out: Path, work: Path, flags: PrepareFlags, tally: _Tally, selections: dict[str, Selection]
) -> dict[str, dict]:
    """The example prompt, the histogram, and the list of rows that could not be used."""
    source = next(name for name in ("test", "validation", "train") if name in tally.examples)
    _, text, ids = tally.examples[source]
    input_ids = torch.tensor([ids], dtype=torch.int64)
    example = {"prompt": text, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    torch.save(example, out / "example_prompt.pt")
    kept = sum(len(selection.index) for selection in selections.values())
    tally.lengths.plot(
        out / f"lengths_{flags.stage}.png",
        f"{flags.stage}: {tally.num_read:,} rows read, {kept:,} kept",
        {"prompt": flags.max_prompt_length, "response": flags.max_response_length},
    )
    files: dict[str, dict] = {"example_prompt.pt": {}, f"lengths_{flags.stage}.png": {}}
    if tally.num_skipped:
        name = f"skipped_{flags.stage}.jsonl"
        shutil.copyfile(work / "skipped.jsonl", out / name)
        files[name] = {"rows": tally.num_skipped}
    return files


def _put_in(folder: Path, out: Path, stage: str, entry: dict[str, Any]) -> None:
    """Bring the finished files in, in the place of all that an earlier run of the stage left."""
    splits = [f"{stage}_{split}{suffix}" for split in SPLIT_NAMES for suffix in (".pt", ".safetensors")]
    with alone(folder):
        info = data_info(folder)
        info["stages"][stage] = entry
        write_json(out / "args.json", info)
        put_in(folder, out, instead_of=[*splits, f"skipped_{stage}.jsonl"])


def _print_end(destination: Path, tally: _Tally, seconds: float, num_workers: int) -> None:
    checked, differ = tally.boundary
    if checked:
        print(f"prompt and response in one piece would get other ids: {differ:,} of the first {checked:,} texts")
    if tally.num_bad:
        print(f"broken rows: {tally.num_bad:,} of {tally.num_read:,}; the first is {_place(tally.first_bad)}")
    processes = f"{num_workers} process{'es' if num_workers > 1 else ''}"
    print(
        f"{destination}: {tally.num_read:,} rows and {tally.num_tokens:,} tokens in {seconds:.1f} s "
        f"({tally.num_read / seconds:,.0f} rows/s, {tally.num_tokens / seconds:,.0f} tokens/s, {processes})"
    )
