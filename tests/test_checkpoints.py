"""Checkpoints: whole or not at all, exact, and particular about what they are loaded into."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.experiment import checkpoints as module
from rlhf.experiment.checkpoints import Checkpoints
from rlhf.experiment.identity import FREE_TO_CHANGE, Identity
from rlhf.experiment.optimizers import make_optimizer
from rlhf.files import WriteError
from rlhf.models.loading import load_policy, load_scorer
from rlhf.rlhf_dpo import DPOFlags
from rlhf.rlhf_ppo import PPOFlags
from rlhf.rlhf_rm import RMFlags
from rlhf.rlhf_sft import SFTFlags
from rlhf.trees.forest import Forest, Tree
from tests.splits import make_model_dir, tokenizer_for

FOREST = Forest([Tree.of(torch.arange(5), torch.arange(7, 12), torch.arange(20, 29))])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return make_model_dir(tmp_path_factory.mktemp("model") / "base")


class Lab:
    """A policy under one fine-tuning mode with its optimiser, and steps to take with it."""

    def __init__(self, source: str, mode: str = "all", **flags) -> None:
        self.flags = SFTFlags(data_dir="data", model_name=source, finetune_mode=mode, optimizer_eps=1e-5, **flags)
        torch.manual_seed(0)
        self.policy = load_policy(source, self.flags)
        self.optimizer = make_optimizer(self.policy, self.flags, 1e-2)
        self.models, self.optimizers = {"model": self.policy}, {"optimizer": self.optimizer}
        self.world_size, self.data, self.model_folders = 1, {"finetune_train": "a"}, {"--model_name": "b"}

    def step(self, n: int = 1) -> Lab:
        for _ in range(n):
            (-self.policy(FOREST)[0].mean()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def save(self, store: Checkpoints, step: int, **extra) -> Lab:
        store.save(step, self.identity, self.models, self.optimizers, tokenizer_for(), extra)
        return self

    def load(self, store: Checkpoints):
        return store.load_last(self.identity, self.models, self.optimizers)

    @property
    def identity(self) -> Identity:
        return Identity("rlhf_sft", self.flags, self.world_size, self.data, self.model_folders)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.policy.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def store_in(folder: Path, keep: int = 0, keep_weights: int = 0) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep=keep, keep_weights=keep_weights)


@pytest.mark.parametrize("mode", ["all", "last_layer", "lora"])
def test_c4_c11_a_step_after_loading_is_the_step_that_would_have_come(tmp_path, source, mode):
    """C4, C11: weights, moments and extra state come back bit for bit, so that the next steps are equal."""
    store = store_in(tmp_path)
    first = Lab(source, mode).step(2).save(store, 2, kl=0.5, nested={"a": [1, 2]})
    again = Lab(source, mode)
    assert not same(again.weights(), first.weights())
    assert again.load(store) == (2, {"kl": 0.5, "nested": {"a": [1, 2]}})
    assert same(again.weights(), first.weights())
    assert same(first.step(2).weights(), again.step(2).weights())
    states = [lab.optimizer.state_dict()["state"] for lab in (first, again)]
    assert all(same(states[0][i], states[1][i]) for i in states[0])


def test_a_checkpoint_is_a_model_folder_with_the_rest_beside_it(tmp_path, source):
    store = store_in(tmp_path)
    Lab(source).step().save(store, 1)
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert {p.name for p in folder.iterdir()} == {"model", "optimizer.pt", "state.json"}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000001", "last"}
    load_policy(str(folder / "model"), SFTFlags(data_dir="data"))
    torch.load(folder / "optimizer.pt", weights_only=True)


def test_a_second_model_is_kept_as_its_trained_tensors(tmp_path, source):
    """What PPO's critic needs: the base it shares is not written twice."""
    store, flags = store_in(tmp_path), SFTFlags(data_dir="data", finetune_mode="last_layer")
    lab = Lab(source)
    critic = load_scorer(source, flags, new_head=True)
    lab.models["critic"] = critic
    lab.save(store, 1)
    before = {name: p.detach().clone() for name, p in critic.own_parameters().items()}
    with torch.no_grad():
        for parameter in critic.own_parameters().values():
            parameter.zero_()
    lab.load(store)
    assert same({name: p.detach() for name, p in critic.own_parameters().items()}, before)


def test_the_last_ones_are_kept(tmp_path, source):
    lab = Lab(source)
    for keep, expected in ((2, [2, 3]), (1, [3]), (0, [1, 2, 3])):
        store = store_in(tmp_path / str(keep), keep)
        for step in (1, 2, 3):
            lab.save(store, step)
        assert [int(p.name.removeprefix("step-")) for p in store.steps()] == expected
        assert (store.folder / "last").resolve().name == "step-00000003"


@pytest.mark.parametrize("higher", [True, False])
def test_c34_the_best_survives_worse_ones(tmp_path, source, higher):
    """C34: with keep-last-1 and a later, worse score, `best` is still that of step 2; a new process knows it too."""
    lab, sign = Lab(source), 1 if higher else -1
    weights = {}
    for step, value in ((1, 1.0), (2, 3.0), (3, 3.0), (4, 2.0)):
        lab.step()
        weights[step] = lab.weights()
        store_in(tmp_path, 1).save_best(step, lab.policy, tokenizer_for(), "val/x", sign * value, higher=higher)
    best = tmp_path / "checkpoints" / "best"
    assert json.loads((best / "best.json").read_text()) == {"step": 2, "metric": "val/x", "value": sign * 3.0}
    kept = load_policy(str(best / "model"), lab.flags)
    assert same(dict(kept.named_parameters()), weights[2])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x93 not this " * 40)


DAMAGES = {"cut": _cut, "empty": lambda path: path.write_bytes(b""), "garbage": _garbage, "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["state.json", "optimizer.pt", "model/model.safetensors"])
def test_c23_a_broken_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, source, file, damage):
    """C23: whichever file is broken, however: the newest whole checkpoint is found without help."""
    store = store_in(tmp_path)
    lab = Lab(source).step().save(store, 1)
    expected = lab.weights()
    lab.step().save(store, 2)
    DAMAGES[damage](store.folder / "step-00000002" / file)
    again = Lab(source)
    assert again.load(store)[0] == 1
    assert same(again.weights(), expected)
    assert f"note: the checkpoint {store.folder / 'step-00000002'} is broken" in capsys.readouterr().out


def test_c4_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path, source):
    store = store_in(tmp_path)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        Lab(source).load(store)
    Lab(source).save(store, 1)
    (store.folder / "step-00000001" / "optimizer.pt").unlink()
    lab = Lab(source)
    before = lab.weights()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        lab.load(store)
    assert same(lab.weights(), before)


def test_c23_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, source):
    """C23: the disk is full in the middle: no half folder, and the older checkpoint is not deleted first."""
    store = store_in(tmp_path, 1)
    lab = Lab(source).save(store, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(WriteError, match=r"step-00000002 cannot be written: No space left on device \(.* are free\)"):
        lab.save(store, 2)
    assert {p.name for p in store.folder.iterdir()} == {"step-00000001", "last"}
    monkeypatch.undo()
    assert Lab(source).load(store)[0] == 1


def test_flags_that_would_make_it_another_run_are_refused(tmp_path, source):
    """The learning rate, say, but not the micro-batch or the logging."""
    store = store_in(tmp_path)
    Lab(source).save(store, 1)
    Lab(source, micro_batch_size=3, log_interval=7, experiment_dir="x", micro_batch_tokens=9).load(store)
    with pytest.raises(UserError, match=r"--learning_rate=0\.5 differs from 1e-05 of the run"):
        Lab(source, learning_rate=0.5).load(store)
    with pytest.raises(UserError, match="--seed=1 differs from 42"):
        Lab(source, seed=1).load(store)


@pytest.mark.parametrize(
    ("each", "world_size", "complaint"),
    [
        (8, 1, None),
        (4, 2, None),
        (1, 8, None),
        (8, 2, r"=8 on each of 2 device\(s\) is 16 in all, and .* has 8 on each of 1, 8 in all; .*mini_batch_size=4"),
        (4, 1, r"=4 on each of 1 device\(s\) is 4 in all, .* 8 in all; resume with --mini_batch_size=8"),
        (2, 3, r"=2 on each of 3 device\(s\) is 6 in all, .*; resume on a number of devices that divides 8"),
    ],
)
def test_c27_a_step_keeps_its_size_on_other_devices(tmp_path, source, each, world_size, complaint):
    """C27: a resumed run may share a step's rows out anew; a step of other rows is refused with both numbers."""
    Lab(source, mini_batch_size=8).save(store_in(tmp_path), 1)
    lab, store = Lab(source, mini_batch_size=each), store_in(tmp_path)
    lab.world_size = world_size
    if complaint is None:
        assert lab.load(store)[0] == 1
        return
    with pytest.raises(UserError, match=complaint):
        lab.load(store)


def test_whitening_on_each_device_apart_keeps_the_devices(tmp_path, source):
    """PPO's rollout counts as the mini-batch does; the number of devices matters with --advantage_scope=rank."""
    lab = Lab(source)
    lab.flags = PPOFlags(data_dir="data", rollout_size=16, mini_batch_size=4, advantage_scope="rank")
    lab.save(store_in(tmp_path), 1)
    lab.flags, lab.world_size = dataclasses.replace(lab.flags, rollout_size=8, mini_batch_size=2), 2
    with pytest.raises(UserError, match=r"--advantage_scope=rank .* has 1 devices, not 2; resume it on 1"):
        lab.load(store_in(tmp_path))
    lab.flags.rollout_size = 16
    with pytest.raises(UserError, match=r"--rollout_size=16 .*; resume with --rollout_size=8"):
        lab.load(store_in(tmp_path))


def test_flags_free_to_change_are_flags():
    names = {field.name for script in (SFTFlags, RMFlags, DPOFlags, PPOFlags) for field in dataclasses.fields(script)}
    assert names >= FREE_TO_CHANGE
    assert not FREE_TO_CHANGE & {"seed", "mini_batch_size", "max_steps", "epochs", "learning_rate", "data_dir"}


def test_weights_of_another_model_are_an_error(tmp_path, source):
    """A lacking tensor is named; an adapter of other layers is no start from scratch (C11)."""
    store = store_in(tmp_path)
    lab = Lab(source)
    lab.save(store, 1)
    other = make_model_dir(tmp_path / "deeper", num_hidden_layers=3)
    mixed = Lab(other)
    mixed.flags = lab.flags
    with pytest.raises(UserError, match=r"lacks model\.layers\.2\..* of another model"):
        mixed.load(store)
    lora = store_in(tmp_path / "lora")
    first = Lab(source, "lora", lora_targets=["q_proj"])
    first.save(lora, 1)
    second = Lab(source, "lora", lora_targets=["v_proj"])
    second.flags = first.flags
    with pytest.raises(UserError, match=r"lacks .*v_proj.* of another model"):
        second.load(lora)


def test_weights_in_several_files_are_read(tmp_path, source):
    """Large models are saved in shards, with an index."""
    store = store_in(tmp_path)
    lab = Lab(source).step().save(store, 1)
    folder = store.folder / "step-00000001" / "model"
    shutil.rmtree(folder)
    lab.policy.model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    again = Lab(source)
    again.load(store)
    assert same(again.weights(), lab.weights())
