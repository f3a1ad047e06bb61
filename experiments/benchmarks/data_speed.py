"""How fast `prepare_data.py` tokenises, beside a bare `tokenizers` batch encode of the same strings.

    python experiments/benchmarks/data_speed.py --tokenizer_name=HuggingFaceTB/SmolLM2-135M --data_file=pairs.jsonl.gz

Real dialogues are repeated, each time with other words changed, into a JSONL of `--num_rows` pairs. In turn, each in a
fresh process whose start is not counted: a bare encode on one thread, one on all threads (both of the first
`--num_bare_rows` pairs: their rate is the same for any number), and the whole of
data_prep/helpful_harmless/prepare_data.py (reading, parsing, tokenising, hashing, dividing and writing all files) with
one process for each core. Prints median rates and two ratios, both wanted at 0.8: `prepare_data.py` over cores x one
thread, and over all threads.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.helpful_harmless import prepare_data
from rlhf.data.dialogue import split_dialogue
from rlhf.data.rows import UnusableRowError
from rlhf.data.text import load_tokenizer
from rlhf.errors import UserError
from rlhf.files import write_json
from rlhf.flags import check_positive, launch

BATCH = 3000
"""Strings of one call of the bare encode."""
CHANGED = 0.1
"""Part of the words that each repetition of a dialogue changes for others of the data."""
SIDES = ("bare, one thread", "bare, all threads", "prepare_data.py")


@dataclass(kw_only=True)
class SpeedFlags:
    """Tokenising speed."""

    tokenizer_name: str
    """Tokenizer of both: a hub id or a local folder."""
    data_file: str = "sample"
    """Pairs of dialogues (`chosen`, `rejected`) as .jsonl or .jsonl.gz."""
    num_rows: int = 100_000
    """Pairs to prepare."""
    num_bare_rows: int = 40_000
    """Pairs of them that the bare encodes take."""
    repeats: int = 3
    """Runs of each side."""
    num_workers: int = 0
    """Processes of `prepare_data.py`; 0: one for each core."""
    seed: int = 0
    """Seed of the words that change."""
    work_dir: str | None = None
    """Folder for the text, kept and used again; a temporary one unless set."""
    output: str | None = None
    """File for all figures as JSON."""


def pairs_of(path: Path) -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of the pairs of a file that `prepare_data.py` would keep."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = []
    for row in rows:
        try:
            (prompt, chosen), (other, rejected) = (split_dialogue(row[key], key) for key in ("chosen", "rejected"))
        except UnusableRowError:
            continue
        if prompt == other and chosen != rejected:
            found.append((prompt, chosen, rejected))
    if not found:
        raise UserError(f"--data_file={path} holds no pair; give dialogues as `chosen` and `rejected`")
    return found


def write_text(flags: SpeedFlags, folder: Path) -> None:
    """Write pairs.jsonl, for `prepare_data.py`, and strings.json, its first prompts and responses one by one."""
    source = Path(prepare_data.__file__).with_name("sample.jsonl") if flags.data_file == "sample" else flags.data_file
    pairs = pairs_of(Path(source))
    words = sorted({word for texts in pairs for text in texts for word in text.split() if word[-1].isalpha()})
    draw = random.Random(flags.seed)

    def changed(text: str) -> str:
        parts = text.split(" ")
        for i, part in enumerate(parts):
            if part.isalpha() and draw.random() < CHANGED:
                parts[i] = draw.choice(words)
        return " ".join(parts)

    strings: list[str] = []
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(flags.num_rows):
            prompt, chosen, rejected = map(changed, pairs[i % len(pairs)])
            file.write(json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}) + "\n")
            strings += (prompt, chosen, rejected) if i < flags.num_bare_rows else ()
    (folder / "strings.json").write_text(json.dumps(strings), encoding="utf-8")


def cpu_seconds() -> float:
    """What this process and those that it has waited for have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def bare(request: dict[str, Any]) -> dict[str, float]:
    """Encode the strings as the `tokenizers` library does it, on as many threads as the environment says."""
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = load_tokenizer(request["tokenizer_name"]).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    strings = json.loads((Path(request["folder"]) / "strings.json").read_text(encoding="utf-8"))
    tokenizer.encode_batch(strings[:BATCH], add_special_tokens=False)
    began, used, num_tokens = time.perf_counter(), cpu_seconds(), 0
    for start in range(0, len(strings), BATCH):
        found = tokenizer.encode_batch(strings[start : start + BATCH], add_special_tokens=False)
        num_tokens += sum(map(len, found))
    used = cpu_seconds() - used
    return {
        "rows": len(strings) // 3,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used,
        "tokens": num_tokens,
    }


def prepared(request: dict[str, Any]) -> dict[str, float]:
    """Run `prepare_data.py`, but for the start of its process."""
    folder = Path(request["folder"])
    flags = prepare_data.PrepareFlags(
        destination_dir=str(folder / "data"),
        dataset_path=str(folder / "pairs.jsonl"),
        tokenizer_name=request["tokenizer_name"],
        stage="preference",
        num_workers=request["num_workers"],
    )
    load_tokenizer(request["tokenizer_name"])  # the first one imports most of transformers
    began, used = time.perf_counter(), cpu_seconds()
    entry = prepare_data.main(flags)
    seconds, used = time.perf_counter() - began, cpu_seconds() - used
    shutil.rmtree(folder / "data")
    rows = sum(split["kept"] + sum(split["dropped"].values()) for split in entry["counts"].values())
    return {
        "rows": rows,
        "seconds": seconds,
        "cpu_seconds": used,
        "kept": sum(split["kept"] for split in entry["counts"].values()),
    }


def measure(side: str, request: dict[str, Any]) -> dict[str, float]:
    """One run of a side in a fresh process."""
    threads = {"bare, one thread": "false", "bare, all threads": "true"}
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {"TOKENIZERS_PARALLELISM": threads[side]} if side in threads else {}
    command = [sys.executable, __file__, "--run", json.dumps({**request, "side": side})]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(runs: dict[str, list[dict[str, float]]], num_cores: int) -> dict[str, Any]:
    """Median rates and their ratios, printed.

    >>> bare = [{"rows": 100, "seconds": s, "tokens": 800} for s in (4.0, 2.0)]
    >>> prepared = {"rows": 200, "seconds": 5.0}
    >>> found = report(dict(zip(SIDES, ([bare[0]], [bare[1]], [prepared]))), 2)
    bare, one thread           25 rows/s       200 tokens/s
    bare, all threads          50 rows/s       400 tokens/s
    prepare_data.py            40 rows/s       320 tokens/s
    prepare_data.py is 0.80 x 2 cores x one thread, 0.80 x all threads
    """
    rates = {side: statistics.median(run["rows"] / run["seconds"] for run in runs[side]) for side in SIDES}
    tokens = runs[SIDES[0]][0]["tokens"] / runs[SIDES[0]][0]["rows"]
    for side, rate in rates.items():
        print(f"{side:<20} {rate:>8,.0f} rows/s {rate * tokens:>9,.0f} tokens/s")
    one, every, ours = rates.values()
    ratios = {"of_cores": ours / one / num_cores, "of_threads": ours / every}
    print(
        f"prepare_data.py is {ratios['of_cores']:.2f} x {num_cores} cores x one thread, "
        f"{ratios['of_threads']:.2f} x all threads"
    )
    return {"cores": num_cores, "rows_per_second": rates, **ratios, "runs": runs}


def main(flags: SpeedFlags) -> dict[str, Any]:
    """Measure all sides in turn; returns the figures."""
    check_positive(flags, "num_rows", "num_bare_rows", "repeats")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work = Path(flags.work_dir or tempfile.mkdtemp())
    folder = work / f"text-{flags.num_rows}-{flags.num_bare_rows}-{flags.seed}"
    try:
        if not (folder / "strings.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(flags, folder)
        request = {"folder": str(folder), "tokenizer_name": flags.tokenizer_name, "num_workers": flags.num_workers}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(flags.repeats):
            for side in SIDES:
                runs[side].append(measure(side, request))
    finally:
        if flags.work_dir is None:
            shutil.rmtree(work)
    found = report(runs, cores)
    if flags.output:
        write_json(flags.output, found)
    return found


def _run(request: dict[str, Any]) -> None:
    work = prepared if request["side"] == "prepare_data.py" else bare
    print(json.dumps(work(request)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        _run(json.loads(sys.argv[2]))
    else:
        launch(main, SpeedFlags)
