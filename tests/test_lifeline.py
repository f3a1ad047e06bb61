"""A process that ends before the others ends them too: with a sentence that names it, soon, and leaving none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ppo import on_two_processes
from tests.splits import make_data, make_model_dir

ROOT = Path(__file__).resolve().parents[1]
PROCESS = """
import atexit, os, signal, sys, time
from pathlib import Path
from rlhf.errors import LAST_WORDS, leave
from rlhf.experiment import lifeline

rank, folder, ways = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")

def broadcast(found):
    file = folder / "address"
    if found is not None:
        (folder / "new").write_text(repr(found))
        (folder / "new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return eval(file.read_text())

lifeline.GRACE = 1.0
line = lifeline.hold(rank, len(ways), broadcast)
time.sleep(0.3)
match ways[rank]:
    case "waits":  # as in a collective operation that never ends
        time.sleep(60)
    case "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    case "raises":
        raise ValueError("row 7 has no answer")
    case "mistaken":
        class Held:
            def __del__(self):  # as a thread of the process group that holds a tensor
                os.abort()

        held = Held()
        atexit.register(lambda: print("logs are closed", file=sys.stderr))
        [tell("--reward has no such file") for tell in LAST_WORDS]
        leave(2)
    case "left":  # what gloo raises in the others
        time.sleep(0.2)
        raise RuntimeError("Connection closed by peer")
    case "done":
        line.close()
    case "late":
        time.sleep(1.0)
        line.close()
"""


def end_of(folder: Path, ways: str) -> list[tuple[int, str]]:
    """(exit status, what it printed) of processes that end in these ways; all within 20 seconds."""
    command = [sys.executable, "-c", PROCESS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(folder), ways], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(len(ways.split(",")))
    ]
    try:
        printed = [process.communicate(timeout=20)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


@pytest.mark.parametrize("dead", [0, 2])
def test_c17_a_killed_process_is_named_by_all_others(tmp_path, dead):
    """Be it the first or another: each of the others ends with status 1 and one sentence."""
    ways = ["waits"] * 3
    ways[dead] = "killed"
    ends = end_of(tmp_path, ",".join(ways))
    assert ends.pop(dead) == (-signal.SIGKILL, "")
    for status, printed in ends:
        assert status == 1
        assert printed.startswith(f"error: process {dead} of 3 ended without a word (killed, or out of memory;")
        assert printed.count("\n") == 1


def test_an_error_is_passed_on(tmp_path):
    """The process that has it prints its traceback; the others print one sentence, which says the error."""
    (first, printed), (other, trace) = end_of(tmp_path, "waits,raises")
    assert (first, other) == (1, 1)
    assert printed.startswith("error: process 1 of 2 ended: ValueError: row 7 has no answer; this process (rank 0)")
    assert trace.endswith("ValueError: row 7 has no answer\n")


def test_a_users_mistake_on_one_process_alone(tmp_path):
    """It keeps its status, 2: what is held up to the interpreter's end cannot change it; what is registered runs."""
    (first, mine), (other, printed) = end_of(tmp_path, "mistaken,waits")
    assert (first, mine) == (2, "logs are closed\n")
    assert other == 1
    assert printed.startswith("error: process 0 of 2 ended: --reward has no such file; this process (rank 1)")


def test_what_the_backend_raises_then_is_not_shown(tmp_path):
    """A connection that is lost because its other end was killed: no traceback, the one sentence."""
    (_, _), (other, printed) = end_of(tmp_path, "killed,left")
    assert other == 1
    assert printed.startswith("error: process 0 of 2 ended without a word")
    assert "Traceback" not in printed


def test_an_orderly_end_is_no_loss(tmp_path):
    """Also where one process is done a second before the others."""
    assert end_of(tmp_path, "done,late,done") == [(0, "")] * 3


REWARD = """
import os, signal

def deadly(prompts, responses, rows):
    if os.environ.get("LOCAL_RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in responses]
"""


def processes_of(word: str) -> list[int]:
    """Numbers of the processes in whose command line the word stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_c17_kill_9_in_a_run_that_fabric_launched(tmp_path):
    """C17: `--devices=2`, whose second process dies in its first reward: the first names it, the status is not 0, and
    within seconds nothing is left."""
    data, model = make_data(tmp_path / "data"), make_model_dir(tmp_path / "model")
    (tmp_path / "my.py").write_text(REWARD)
    command = [
        sys.executable, "rlhf/rlhf_grpo.py", f"--data_dir={data}", f"--sft_experiment_dir={model}", "--devices=2",
        "--accelerator=cpu", f"--experiment_dir={tmp_path / 'run'}", f"--reward=function:{tmp_path}/my.py:deadly",
        "--num_samples=2", "--rollout_size=2", "--mini_batch_size=2", "--max_new_tokens=4", "--logger=none",
        "--precision=32-true", "--eval_interval=0", "--max_steps=2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    assert "error: process 1 of 2 ended without a word (killed" in done.stderr
    assert "Traceback" not in done.stderr
    for _ in range(50):
        if not processes_of(str(tmp_path)):
            break
        time.sleep(0.1)
    assert processes_of(str(tmp_path)) == []


MISTAKE = """
import sys
import torch
from rlhf import rlhf_sft
from rlhf.errors import UserError
from rlhf.flags import launch

torch.set_num_threads(1)
loaded = rlhf_sft.load_policy

def load(source, flags):
    if torch.distributed.get_rank() == 1:
        raise UserError("the weights in model.safetensors cannot be read; copy the file again")
    return loaded(source, flags)

rlhf_sft.load_policy = load
sys.argv[1:] = sys.argv[1].split()
launch(rlhf_sft.main, rlhf_sft.SFTFlags)
"""


def test_c17_a_mistake_on_one_of_torchruns_processes(tmp_path):
    """The other is told while it waits, in the setting up of its model, for the one that has ended."""
    data, model = make_data(tmp_path / "data"), make_model_dir(tmp_path / "model")
    (tmp_path / "script.py").write_text(MISTAKE)
    flags = (
        f"--data_dir={data} --model_name={model} --devices=2 --strategy=ddp --accelerator=cpu --logger=none "
        f"--precision=32-true --experiment_dir={tmp_path / 'run'}"
    )
    with pytest.raises(AssertionError) as ended:
        on_two_processes(tmp_path / "script.py", flags, timeout=120)
    printed = str(ended.value)
    sentence = "the weights in model.safetensors cannot be read; copy the file again"
    assert f"error: {sentence}\n" in printed
    assert f"error: process 1 of 2 ended: {sentence}; this process (rank 0) cannot go on without it\n" in printed
    assert not (tmp_path / "run").exists()
