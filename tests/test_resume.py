"""Resuming: what may not have changed, what may not be missing, signals, logs to the byte, and what it costs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf import rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.data.splits import load_split, write_split
from rlhf.errors import UserError
from rlhf.experiment import identity, logs
from rlhf.experiment.run import Step
from rlhf.models.loading import load_policy, save_model
from rlhf.rlhf_sft import SFTFlags
from tests.kill import World, differences, in_child, raise_signals
from tests.splits import make_data, make_model_dir, metrics_of, tokenizer_for
from tests.test_checkpoints import Lab, same, store_in


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("resume") / "world")


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> Path:
    """PPO's run, killed with a checkpoint after step 2."""
    folder = tmp_path_factory.mktemp("stopped") / "ppo"
    in_child(world.run("ppo", folder, keep_checkpoints=9), folder)
    for gone in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(folder / gone)
    return folder


def resume(world: World, stopped: Path, folder: Path, **given) -> dict:
    shutil.copytree(stopped, folder, symlinks=True, dirs_exist_ok=True)
    return rlhf_ppo.main(world.flags("ppo", folder, resume=True, **given))


def change_state(folder: Path, change) -> None:
    for path in folder.glob("checkpoints/step-*/state.json"):
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))


@pytest.mark.parametrize("key", ["kl", "score_moments", "skipped_steps", "log_sizes"])
def test_c4_a_counter_that_is_missing_is_named(world, stopped, tmp_path, key):
    """C4: it is no silent start from scratch; nor is a part of one."""
    folder = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    change_state(folder, lambda state: state["extra"].pop(key))
    with pytest.raises(UserError, match=rf"step-00000002 lacks '{key}', without which"):
        resume(world, folder, tmp_path / "again")
    if key == "score_moments":
        folder = shutil.copytree(stopped, tmp_path / "part", symlinks=True)
        change_state(folder, lambda state: state["extra"][key].pop("count"))
        with pytest.raises(UserError, match=r"step-00000002 \(score_moments\) lacks 'count'"):
            resume(world, folder, tmp_path / "again-part")


def test_c4_a_part_of_state_json_that_is_missing_is_named(tmp_path, world):
    for key in ("flags", "world_size", "extra", "reward_moments"):
        store = store_in(tmp_path / key)
        Lab(world.policy).save(store, 1)
        change_state(tmp_path / key, lambda state, key=key: state.pop(key))
        with pytest.raises(UserError, match=f"state.json lacks '{key}'"):
            Lab(world.policy).load(store)


def test_c4_an_optimiser_of_other_parameters_is_refused(tmp_path, world):
    """C4: torch itself takes the moments of any parameters, as long as there are as many."""
    store = store_in(tmp_path)
    lab = Lab(world.policy).step().save(store, 1)
    path = store.folder / "step-00000001" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    before = Lab(world.policy)
    state["state"][0]["exp_avg"] = torch.zeros(3, 5)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"optimizer\.pt has exp_avg of parameter 0 in the shape \(3, 5\), and that of"):
        before.load(store)
    del state["param_groups"][1]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"optimizer\.pt is the state of an optimiser of \[\d+\] parameters, and this"):
        before.load(store)
    assert lab.optimizer.state_dict()["state"]


def test_c4_a_tensor_of_another_shape_or_too_many_is_refused(tmp_path, world):
    """C4, C11: copying would stretch one of a single element over the parameter."""
    small = make_model_dir(tmp_path / "small", "gpt2", n_inner=8)
    store = store_in(tmp_path)
    other, lab = Lab(small).save(store, 1), Lab(world.policy)
    lab.flags = other.flags
    with pytest.raises(UserError, match=r"mlp.* in the shape .* it is of another model"):
        lab.load(store)


def test_a_resumed_script_is_the_one_that_began(tmp_path, world):
    store = store_in(tmp_path)
    Lab(world.policy).save(store, 1)
    change_state(tmp_path, lambda state: state.update(script="rlhf_dpo"))
    with pytest.raises(UserError, match=r"is of rlhf_dpo\.py; resume it with that script, not with rlhf_sft\.py"):
        Lab(world.policy).load(store)


def test_c4_changed_flags_are_all_named(tmp_path, world):
    store = store_in(tmp_path)
    Lab(world.policy).save(store, 1)
    with pytest.raises(UserError) as error:
        Lab(world.policy, learning_rate=0.5, seed=1, log_interval=9).load(store)
    assert "--seed=1 differs from 42, --learning_rate=0.5 differs from 1e-05 of the run in" in str(error.value)
    assert "log_interval" not in str(error.value)


def test_c4_data_that_has_changed_is_refused_by_its_split(tmp_path, world):
    """C4: the same rows in another order are other data; the splits that did not change are not named."""
    own = World(make_data(tmp_path / "data"), world.policy, world.reward_model, world.reward)
    folder = tmp_path / "run"
    rlhf_sft.main(own.flags("sft", folder, keep_checkpoints=9))
    for gone in ("final", "checkpoints/step-00000005"):
        shutil.rmtree(folder / gone)
    rows = list(load_split(own.data, "finetune", "train"))
    write_split(own.data, "finetune", "train", rows[::-1])
    with pytest.raises(UserError, match=r"the data in --data_dir=.* have changed .* \(finetune_train\); bring back"):
        rlhf_sft.main(own.flags("sft", folder, resume=True))
    write_split(own.data, "finetune", "train", rows)
    shutil.rmtree(folder / "checkpoints")
    (Path(own.data) / "finetune_validation.pt").unlink()
    (Path(own.data) / "finetune_validation.safetensors").unlink()
    with pytest.raises(UserError, match=r"\(finetune_validation\)"):  # before the first checkpoint too
        rlhf_sft.main(own.flags("sft", folder, resume=True))


def test_c4_models_that_have_changed_are_refused_by_their_flags(tmp_path, world, stopped):
    """C4: the reference and the reward model are read again from folders, which may hold something else by now."""
    reward = shutil.copytree(world.reward_model, tmp_path / "reward")
    given = {"reward_model": str(reward)}
    own = World(**{**vars(world), **given})
    folder = tmp_path / "run"
    rlhf_ppo.main(own.flags("ppo", folder, keep_checkpoints=9))
    for gone in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(folder / gone)
    make_model_dir(reward, "gpt2", scorer=True, seed=2)
    with pytest.raises(UserError, match=r"the models have changed since the run in .* \(--rm_experiment_dir\); bring"):
        rlhf_ppo.main(own.flags("ppo", folder, resume=True))


@pytest.mark.parametrize("mode", ["last_layer", "lora"])
def test_fingerprints_see_what_training_changes(tmp_path, world, mode):
    """A step of the last layer, or of an adapter, in a file of which only samples are read; not a new name."""
    lab = Lab(world.policy, mode)
    found = set()
    for step in range(3):
        folder = tmp_path / f"{step}" / "model"
        save_model(lab.policy, tokenizer_for(), folder)
        flags = SFTFlags(data_dir="d", model_name=str(folder))
        (one,) = identity.model_fingerprints(flags).values()
        copy = shutil.copytree(folder, tmp_path / f"copy-{step}")
        flags.model_name = str(copy)
        assert identity.model_fingerprints(flags) == {"--model_name": one}
        found.add(one)
        lab.step()
    assert len(found) == 3


def test_fingerprints_name_every_model(world):
    flags = world.flags("ppo", Path("x"), reward=[f"0.5*model:{world.policy}", "length:3"])
    names = {"--model_name", "--rm_experiment_dir", f"--reward 0.5*model:{world.policy}"}
    assert set(identity.model_fingerprints(flags)) == names
    flags.model_name = "someone/on-the-hub"
    assert identity.model_fingerprints(flags)["--model_name"] == "someone/on-the-hub"


def test_c34_of_older_checkpoints_the_weights_are_kept(tmp_path, world, capsys):
    """C34: --keep_checkpoints=1 --keep_weights=2 of five: the fifth whole, model/ of two, none of the others."""
    store, lab = store_in(tmp_path, 1, keep_weights=2), Lab(world.policy)
    expected = {}
    for step in range(1, 6):
        lab.step().save(store, step)
        expected[step] = lab.weights()
    held = {path.name: {p.name for p in path.iterdir()} for path in store.steps()}
    whole = {"model", "optimizer.pt", "state.json"}
    assert held == {"step-00000003": {"model"}, "step-00000004": {"model"}, "step-00000005": whole}
    kept = load_policy(str(store.folder / "step-00000003" / "model"), lab.flags)
    assert same(dict(kept.named_parameters()), expected[3])
    (store.folder / "step-00000005" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint to resume from \(step-00000005: FileNotFoundError"):
        Lab(world.policy).load(store)
    assert capsys.readouterr().out.count("is broken") == 1
    shutil.rmtree(store.folder / "step-00000005")
    with pytest.raises(UserError, match=r"no whole checkpoint .* \(step-00000004 keeps its weights alone\)"):
        Lab(world.policy).load(store)
    with pytest.raises(UserError, match="--keep_weights has no meaning with --keep_checkpoints=0"):
        rlhf_sft.main(world.flags("sft", tmp_path / "run", keep_checkpoints=0))


def test_c34_checkpoints_after_the_one_that_is_resumed_do_not_count(tmp_path, world):
    """C23: a broken newer one must not push out the good one when older ones are thinned out."""
    store, lab = store_in(tmp_path, 2), Lab(world.policy)
    for step in (1, 2, 3):
        lab.save(store, step)
    shutil.copytree(store.folder / "step-00000003", store.folder / "step-00000009")
    (store.folder / "step-00000009" / "state.json").write_text("{")
    assert Lab(world.policy).load(store)[0] == 3
    store.settle(3)
    assert [path.name[-1] for path in store.steps()] == ["2", "3", "9"]
    assert os.readlink(store.folder / "last") == "step-00000003"


class _Stop(Exception):
    pass


def test_c4_resuming_costs_the_same_after_many_steps(world, tmp_path, monkeypatch):
    """C4: Python's calls and bytes read of logs, from start to the first update, after 2 steps and after 60."""
    given = {"max_steps": 70, "logger": "none", "eval_interval": 0, "save_interval": 0}
    calls = {}
    for steps in (2, 60):
        folder = tmp_path / f"{steps}"
        with monkeypatch.context() as patch:
            raise_signals(patch, Step, "finish", steps, signal.SIGTERM)
            assert rlhf_sft.main(world.flags("sft", folder, **given))["steps"] == steps
        with monkeypatch.context() as patch:
            patch.setattr(Step, "update", lambda *_, **__: (_ for _ in ()).throw(_Stop))
            patch.setattr(logs, "_end_of_last_line", None)  # no log is read
            counted = [0]

            def count(frame, event, _, counted=counted):
                counted[0] += event == "call"

            sys.setprofile(count)
            try:
                with pytest.raises(_Stop):
                    rlhf_sft.main(world.flags("sft", folder, resume=True, **given))
            finally:
                sys.setprofile(None)
            calls[steps] = counted[0]
    assert abs(calls[60] - calls[2]) <= 0.01 * calls[2], calls


def test_c4_logs_are_cut_to_the_byte(tmp_path, capsys):
    """C4: to what the checkpoint saw, also of lines of its own step; a file that lost its end, to whole lines."""
    first = logs.Logs(tmp_path, "none", "x")
    first.write(1, {"a": 1.0})
    first.write_samples(1, [{"response": "é"}])
    sizes = first.sizes()
    first.write(1, {"val/b": 2.0})
    first.write_samples(2, [{"response": "b"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a"')
    second = logs.Logs(tmp_path, "none", "x", sizes=sizes)
    assert metrics_of(tmp_path) == [{"step": 1, "a": 1.0}]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1, "response": "é"}\n'
    second.write(2, {"a": 3.0})
    sizes = second.sizes()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-4])
    logs.Logs(tmp_path, "none", "x", sizes=sizes)
    assert metrics_of(tmp_path) == [{"step": 1, "a": 1.0}]
    assert "has lost its last lines" in capsys.readouterr().out
    logs.Logs(tmp_path, "none", "x")
    assert metrics_of(tmp_path) == []


def test_c4_a_huge_log_is_cut_without_reading_it(tmp_path, monkeypatch):
    """C4: a sparse file of 50 GB, of which only blocks at the end are looked at."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    os.truncate(path, 50_000_000_000)
    logs.Lines(path, 12)
    assert metrics_of(tmp_path) == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b"x" * (3 * logs.BLOCK_BYTES))
    logs.Lines(path, 10**9).write({"step": 2})
    assert metrics_of(tmp_path) == [{"step": 1}, {"step": 2}]


def test_c4_tensorboard_and_csv_have_every_line_once(tmp_path):
    """C4: after a kill behind a checkpoint, and a step that is done again."""
    for name in ("tensorboard", "csv"):
        first = logs.Logs(tmp_path / name, name, "x")
        (tmp_path / name).mkdir(exist_ok=True)
        first.write(1, {"a": 1.0})
        first.write(1, {"val/b": float("nan")})
        sizes = first.sizes()
        first.write(2, {"a": 9.0})
        first.sizes()
        again = logs.Logs(tmp_path / name, name, "x", sizes=sizes)
        again.write(2, {"a": 2.0})
        again.write(3, {"a": 3.0, "c": 4.0})
        again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    with (tmp_path / "csv" / "csv" / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert rows == [
        {"step": "1", "a": "1.0"},
        {"step": "1", "val/b": "nan"},
        {"step": "2", "a": "2.0"},
        {"step": "3", "a": "3.0", "c": "4.0"},
    ]


def test_c4_a_reward_models_moments_go_on(world, tmp_path, monkeypatch):
    """C4: mean and scale of the last evaluation are in every checkpoint's config.json, also after a resume."""
    given = {"eval_interval": 4, "save_interval": 1, "keep_checkpoints": 9}
    rlhf_rm.main(world.flags("rm", tmp_path / "straight", **given))
    with monkeypatch.context() as patch:
        raise_signals(patch, Step, "update", 2, signal.SIGTERM)
        rlhf_rm.main(world.flags("rm", tmp_path / "run", **given))
    rlhf_rm.main(world.flags("rm", tmp_path / "run", resume=True, **given))
    assert differences(tmp_path / "straight", tmp_path / "run") == []
    config = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "model" / "config.json").read_text())
    assert config["reward_mean"] != 0.0
