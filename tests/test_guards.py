"""Guards of runs that sample: a planted reward hack ends them within 20 updates, a healthy run never hears of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf import rlhf_grpo, rlhf_online_dpo, rlhf_ppo
from rlhf.errors import UserError
from rlhf.experience import Experience
from rlhf.experiment.checkpoints import Checkpoints
from rlhf.experiment.steps import Step
from rlhf.flags import launch
from rlhf.guards import Collapse, GuardFlags, Guards, health, repetition
from rlhf.models.loading import resolve
from tests.kill import World as KillWorld
from tests.kill import differences
from tests.ppo import World, flags_of, make_world, set_up
from tests.splits import metrics_of, quick_flags, tokenizer_for

UPDATES = 20
COMMON = {
    "critic_init": "zero",
    "rm_experiment_dir": None,
    "rollout_size": 16,
    "mini_batch_size": 8,
    "ppo_epochs": 2,
    "max_new_tokens": 16,
    "max_steps": UPDATES,
    "epochs": 99,
    "critic_learning_rate": 1e-3,
    "lr_schedule": "constant",
    "missing_eos": "keep",
    "save_interval": 1,
    "keep_checkpoints": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """With `reward.py:token`, which pays for one token: the policy's commonest."""
    folder = tmp_path_factory.mktemp("guards")
    found = make_world(folder, num_train=24)
    stop = tokenizer_for().eos_token_id
    sampled = Counter(
        i for e in set_up(flags_of(found, folder / "x")).collect() for i in e.response.tolist() if i != stop
    )
    (folder / "reward.py").write_text(
        f"def token(prompts, responses, rows):\n"
        f"    return [sum(i == {sampled.most_common(1)[0][0]} for i in row['response_ids']) / 4 for row in rows]\n"
    )
    return found


def hack_of(world: World) -> list[str]:
    return [f"function:{Path(world.sft).parent}/reward.py:token"]


def hacked(world: World, folder: Path, **changes):
    """PPO on the planted reward, its policy held by nothing."""
    given = {**COMMON, "reward": hack_of(world), "init_kl_coeff": 0.0, "actor_learning_rate": 3e-3, **changes}
    return flags_of(world, folder, **given)


def train_lines(folder: Path) -> list[dict]:
    return [line for line in metrics_of(folder) if "train/score" in line]


def test_c9_a_hacked_reward_warns_then_ends_the_run(world, tmp_path, capsys):
    """C9: within 20 updates, with the numbers; the one checkpoint that is kept is from before the first warning."""
    folder = tmp_path / "run"
    with pytest.raises(Collapse, match=r"KL to the reference is .* nats a token.*3 times in a row.*step-\d+ is from"):
        rlhf_ppo.main(hacked(world, folder, eval_interval=1))
    lines = train_lines(folder)
    assert len(lines) < UPDATES
    assert lines[-1]["train/score"] > 2 * lines[0]["train/score"]
    (kept,) = [path for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-")]
    step = json.loads((kept / "state.json").read_text())["step"]
    best = json.loads((folder / "checkpoints" / "best" / "best.json").read_text())["step"]
    # A line follows its update: line i is of the rollout from the weights after step i.
    firing = [i for i, line in enumerate(lines) if line["train/guards_firing"]]
    assert step == firing[0] - 1
    assert best < firing[0]
    assert f"warning: after step {firing[0]} the KL" in capsys.readouterr().out
    assert resolve(str(folder), "x") == str(folder / "checkpoints" / "last" / "model")
    assert not (folder / "final").exists()


def test_a_run_without_a_reference_is_guarded_too(world, tmp_path):
    """GRPO without a KL: the same hack is found by what the responses look like."""
    flags = quick_flags(
        rlhf_grpo.GRPOFlags, world.data, tmp_path / "run", sft_experiment_dir=world.sft, reward=hack_of(world),
        num_samples=8, rollout_size=4, max_new_tokens=16, max_steps=UPDATES, learning_rate=1e-2, guard_patience=2,
        on_collapse="stop",
    )  # fmt: skip
    with pytest.raises(Collapse, match=r"repeats what stands in it|end by themselves|empty"):
        rlhf_grpo.main(flags)


def test_a_healthy_run_is_left_alone(world, tmp_path, capsys):
    """C9: as many updates, the same policy, a reward that it can learn (to end after six tokens), a KL."""
    flags = hacked(
        world, tmp_path / "run", reward=["length:6"], init_kl_coeff=0.05, actor_learning_rate=5e-4, eval_interval=5,
        rollout_size=24, save_interval=0,
    )  # fmt: skip
    rlhf_ppo.main(flags)
    lines = train_lines(tmp_path / "run")
    assert len(lines) == UPDATES
    early, late = (sum(line["train/score"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert late > early + 0.1
    assert not any(line["train/guards_firing"] for line in lines)
    printed = capsys.readouterr().out
    assert "at the start" not in printed
    assert "nats a token" not in printed


def test_what_the_guards_remember_is_in_the_checkpoint(world, tmp_path):
    """A run that is resumed ends at the same step with the same sentence as the unbroken one; with
    --on_collapse=warn it goes on to its end."""
    ends = []
    with pytest.raises(Collapse) as unbroken:
        rlhf_ppo.main(hacked(world, tmp_path / "one"))
    ends.append(str(unbroken.value).replace(str(tmp_path / "one"), ""))
    flags = hacked(world, tmp_path / "two")
    state = {"interrupted": False}
    steps = rlhf_ppo.Run.steps

    def stopping(run, num_rows):
        for step in steps(run, num_rows):
            yield step
            if run.step_index == 2 and not state["interrupted"]:
                state["interrupted"] = True
                run._signals.stop = True

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rlhf_ppo.Run, "steps", stopping)
        rlhf_ppo.main(flags)
    assert state["interrupted"]
    with pytest.raises(Collapse) as resumed:
        rlhf_ppo.main(dataclasses.replace(flags, resume=True))
    ends.append(str(resumed.value).replace(str(tmp_path / "two"), ""))
    assert ends[0] == ends[1]
    last = len(train_lines(tmp_path / "two")) + 2
    warned = dataclasses.replace(flags, resume=True, on_collapse="warn", max_steps=UPDATES)
    summary = rlhf_ppo.main(warned)
    assert summary["steps"] == UPDATES > last
    assert train_lines(tmp_path / "two")[-1]["train/guards_firing"] > 0


FIRING = (3, 4, 5)


@pytest.fixture(scope="module")
def kill_world(tmp_path_factory) -> KillWorld:
    return KillWorld.make(tmp_path_factory.mktemp("firing") / "world")


def planted(world: KillWorld, folder: Path, at: dict[int, int] | None = None, **given) -> list[set[int]]:
    """GRPO in which a guard fires at the steps `FIRING`, a checkpoint at every step: those that are there at the end
    of each step, and of the run.

    Args:
        at: signals that come in the update of a step.
    """
    there: list[set[int]] = []

    def look() -> None:
        there.append({int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")})

    update, finish = Step.update, Step.finish

    def signalled(self, *arguments, **options):
        if number := (at or {}).get(self.run.step_index):
            os.kill(os.getpid(), number)
        return update(self, *arguments, **options)

    def looked_at(self, bar):
        look()
        finish(self, bar)

    given = {"on_collapse": "warn", "keep_weights": 0, "save_interval": 1, "eval_interval": 0, "max_steps": 8} | given
    flags = world.flags("grpo", folder, **given)
    with pytest.MonkeyPatch.context() as patch:
        faults = {True: {"length": "a fault is planted"}, False: {}}
        patch.setattr(Guards, "_faults", lambda self, _: faults[self.run.step_index in FIRING])
        patch.setattr(Step, "update", signalled)
        patch.setattr(Step, "finish", looked_at)
        rlhf_grpo.main(flags)
    look()
    return there


def test_c9_the_last_good_checkpoint_stays_while_a_guard_fires(kill_world, tmp_path, capsys):
    """C9: with --keep_checkpoints=1, that of step 2 while it fires in steps 3 to 5, whether the run goes on saving,
    saves only what is asked for by signals, or ends; then it is thinned out as any other."""
    before, after = [set(), {1}, {2}], [{6}, {7}, {8}]
    assert planted(kill_world, tmp_path / "warn") == [*before, {2, 3}, {2, 4}, {2, 5}, *after]
    good = tmp_path / "warn" / "checkpoints" / "step-00000002"
    warned = f"warning: after step 3 a fault is planted; {good} is from before, and stays while this lasts\n"
    assert warned in capsys.readouterr().out
    stop = {"on_collapse": "stop", "guard_patience": 4}
    assert planted(kill_world, tmp_path / "stop", **stop) == [*before, {2}, {2}, {2}, *after]
    asked = planted(kill_world, tmp_path / "asked", {3: signal.SIGUSR1}, **stop)
    assert asked == [*before, {2}, {2, 4}, {2, 4}, *after]
    ended = planted(kill_world, tmp_path / "ended", {4: signal.SIGTERM}, **stop)
    assert ended == [*before, {2}, {2}, {2, 5}]
    assert planted(kill_world, tmp_path / "short", max_steps=5, **stop)[-1] == {2, 5}


def test_c4_c9_what_stays_is_in_the_checkpoint(kill_world, tmp_path):
    """C4, C9: ended by SIGTERM as it begins to fire or fires for the last time, gone on with from there or, as after a
    kill, from the checkpoint before: what is left is what the unbroken run leaves."""
    planted(kill_world, tmp_path / "whole", max_steps=7)
    for last in (FIRING[0], FIRING[-1]):
        for name in ("stopped", "killed"):
            folder = tmp_path / f"{name}-{last}"
            planted(kill_world, folder, {last: signal.SIGTERM}, max_steps=7, keep_checkpoints=2)
            if name == "killed":
                shutil.rmtree(folder / "checkpoints" / f"step-{last + 1:08d}")
            first = last + (name == "stopped")
            later = [{2, i} if i in FIRING else {i} for i in range(first + 1, 7)]
            assert planted(kill_world, folder, resume=True, max_steps=7) == [{2, first}, *later, {7}]
            assert differences(tmp_path / "whole", folder) == []


def test_online_dpo_is_guarded(world, tmp_path):
    """The guards stand in its loop too: a limit below what any rollout has ends it at once."""
    flags = quick_flags(
        rlhf_online_dpo.OnlineDPOFlags, world.data, tmp_path / "run", sft_experiment_dir=world.sft,
        reward=hack_of(world), rollout_size=4, max_new_tokens=8, max_steps=9, guard_length=0.5, guard_patience=2,
        on_collapse="stop",
    )  # fmt: skip
    with pytest.raises(Collapse, match=r"stopped after step 1: responses have \d+ tokens, \d+ at the start"):
        rlhf_online_dpo.main(flags)


def test_the_exit_status_is_3(capsys, monkeypatch):
    """Not that of a wrong flag: a script that starts runs can tell them apart."""

    @dataclasses.dataclass
    class NoFlags:
        """Nothing."""

    def main(flags):
        raise Collapse("stopped after step 9: gibberish")

    monkeypatch.setattr("sys.argv", ["rlhf_ppo.py"])
    with pytest.raises(SystemExit) as done:
        launch(main, NoFlags)
    assert done.value.code == 3
    assert capsys.readouterr().err == "error: stopped after step 9: gibberish\n"


def test_a_rollout_counts_once(tmp_path):
    """A checkpoint stands before its step's update: the resumed run samples that rollout again, and watches it then."""
    run = Recorder(tmp_path)
    guards = Guards(run, GuardFlags())
    guards.watch(run, FINE)
    assert guards.state_dict()["seen"]["rollouts"] == 0
    run.step_index = 1
    assert guards.state_dict()["seen"]["rollouts"] == 1
    guards.watch(run, FINE)
    assert guards.state_dict()["seen"]["rollouts"] == 1


def test_small_rollouts_are_judged_together(tmp_path):
    """One response without EOS is no collapse; sixteen in a row, one a rollout, are: from the ninth on more than half
    of the last sixteen, which is a fall by more than 0.5, so the eleventh ends the run."""
    run = Recorder(tmp_path)
    guards = Guards(run, GuardFlags())
    for run.step_index in range(20):
        guards.watch(run, FINE[:1])
    assert len(guards.state_dict()["seen"]["recent"]) == 16
    assert guards.state_dict()["seen"]["rollouts"] == 3
    run.step_index = 20
    restored = Guards(run, GuardFlags())
    restored.load_state_dict(json.loads(json.dumps(guards.state_dict())))
    for _ in range(10):
        restored.watch(run, FAULTS["eos"][:1])
    assert len(run.said) == 1
    with pytest.raises(Collapse, match=r"31% of the responses end by themselves, 100% at the start"):
        restored.watch(run, FAULTS["eos"][:1])


def experience(response: list[int], *, ended: bool = True, ratio: float | None = 0.0, score: float = 0.0) -> Experience:
    num = len(response)
    ref = None if ratio is None else torch.full((num,), -1.0 - ratio)
    return Experience(0, torch.tensor([1]), torch.tensor(response), torch.full((num,), -1.0), ref, None, score, ended)


def test_health_by_hand():
    """Two responses of 2 and 8 tokens, log-ratios 0.5 and 0.25 a token: (1 + 2) / 10 nats a token, 3 / 2 a response; of
    the second's five 4-grams four repeat the first; the first, a word and EOS, is not empty."""
    found = health([experience([5, 2], ratio=0.5, score=1.0), experience([7] * 8, ended=False, ratio=0.25, score=3.0)])
    assert found == pytest.approx(
        {"eos": 0.5, "empty": 0.0, "length": 5.0, "repetition": 0.4, "score_std": 1.0, "kl": 0.3, "kl_of_response": 1.5}
    )
    assert health([experience([2]), experience([], ended=False), experience([4], ended=False)])["empty"] == 2 / 3
    assert "kl" not in health([experience([5, 2], ratio=None)])
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


FINE = [experience([5, 6, 7, 8, 2], ratio=0.1)] * 4
FAULTS = {
    "kl": [experience([5, 6, 7, 8, 2], ratio=2.5)] * 4,
    "eos": [experience([5, 6, 7, 8, 9], ended=False)] * 3 + FINE[:1],
    "empty": [experience([2])] * 3 + FINE[:1],
    "length": [experience(list(range(41)))] * 4,
    "repetition": [experience([5] * 9 + [2])] * 4,
}


class Recorder:
    """What a guard needs of a run and a step."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.values: dict[str, float] = {}
        self.step_index, self.logs, self.metrics = 0, None, self
        self.saved_at, self.save_asked = -1, False
        self.checkpoints = Checkpoints(folder, keep=1)

    def say(self, text: str) -> None:
        self.said.append(text)

    def put(self, name: str, value: float) -> None:
        self.values[name] = value


@pytest.mark.parametrize("name", FAULTS)
def test_each_guard_has_a_limit_of_its_own(name, tmp_path):
    """It warns once, counts in a row, ends the run at the third, forgets when it is over, and is off at 0; no other
    guard fires with it."""
    run = Recorder(tmp_path)
    guards = Guards(run, GuardFlags())
    for experiences in (FINE, FINE, FINE, FAULTS[name], FAULTS[name], FINE, FAULTS[name]):
        guards.watch(run, 4 * experiences)
    assert guards.firing
    assert not guards.may_save
    assert run.values["train/guards_firing"] == 1
    assert len(run.said) == 2
    assert all(f"--guard_{name}=" in text for text in run.said)
    guards.watch(run, 4 * FAULTS[name])
    with pytest.raises(Collapse, match=f"--guard_{name}=.*no checkpoint"):
        guards.watch(run, 4 * FAULTS[name])
    off = Guards(run, GuardFlags(**{f"guard_{name}": 0.0}))
    for experiences in (FINE, FINE, FINE, *[FAULTS[name]] * 4):
        off.watch(run, 4 * experiences)
    assert not off.firing


def test_held_out_scores(tmp_path):
    """One deviation (2) below the best, 0.0, is too far; a high score afterwards is the best only of a healthy run."""
    run = Recorder(tmp_path)
    guards = Guards(run, GuardFlags(guard_patience=2))
    guards.watch(run, [experience([5, 2], score=-1.0), experience([5, 2], score=3.0)])
    assert [guards.evaluated(score) for score in (-3.0, 0.0, -1.9, -2.1, 0.0)] == [True, True, True, False, True]
    assert len(run.said) == 1
    assert "1.1 deviations below its best (--guard_score=1)" in run.said[0]
    assert not guards.evaluated(-2.5)
    with pytest.raises(Collapse, match="held-out score -4 is 2 deviations"):
        guards.evaluated(-4.0)
    assert Guards(run, GuardFlags()).evaluated(1.0)


def test_limits_below_0_are_refused():
    with pytest.raises(UserError, match="guard_kl=-1"):
        GuardFlags(guard_kl=-1)
    with pytest.raises(UserError, match="guard_patience=0"):
        GuardFlags(guard_patience=0)
