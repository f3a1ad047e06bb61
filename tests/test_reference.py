"""Stored reference log-probabilities, and the curves that are measured against them."""

from __future__ import annotations

import gc
import math
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf import rlhf_dpo
from rlhf.data.splits import load_split, write_split
from rlhf.experiment import reference
from rlhf.experiment.metrics import Metrics
from rlhf.experiment.reference import ReferenceLogps
from rlhf.experiment.run import Run, Step
from rlhf.models.loading import load_policy
from rlhf.rlhf_dpo import DPOFlags, main
from rlhf.trees.batches import rows_of_step
from tests import offline
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags

NUM_TRAIN, NUM_VALIDATION = 8, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {"one": make_model_dir(root / "one"), "other": make_model_dir(root / "other", seed=1)}


@pytest.fixture
def data(tmp_path) -> str:
    return make_data(tmp_path / "data", num_train=NUM_TRAIN, num_validation=NUM_VALIDATION)


def run(data: str, folder: Path, model: str, **given: Any) -> dict:
    return main(quick_flags(DPOFlags, data, folder, model_name=model, **given))


def computed(capsys) -> int:
    """How many log-probabilities the last run said that it computed."""
    return int(re.findall(r"(\d+) of its log-probabilities computed", capsys.readouterr().out)[-1])


def test_c19_a_second_run_computes_nothing_and_is_the_same(data, models, tmp_path, capsys):
    """C19: every response once; then 0, though rate, batches and order differ; the numbers are the same."""
    run(data, tmp_path / "first", models["one"])
    assert computed(capsys) == 2 * (NUM_TRAIN + NUM_VALIDATION)
    run(data, tmp_path / "again", models["one"])
    assert computed(capsys) == 0
    assert same_losses(tmp_path / "first", tmp_path / "again")
    run(data, tmp_path / "changed", models["one"], learning_rate=0.5, shuffle=False, micro_batch_size=1)
    assert computed(capsys) == 0


def test_c19_a_changed_row_is_computed_alone(data, models, tmp_path, capsys):
    """C19: one rejected response changes, and the rows turn round: one log-probability. A changed prompt: two."""
    run(data, tmp_path / "first", models["one"])
    rows = list(load_split(data, "preference", "train"))[::-1]
    rows[3]["rejected_input_ids"] = torch.cat([rows[3]["rejected_input_ids"][:-1], torch.tensor([77, 78])])
    write_split(data, "preference", "train", rows)
    capsys.readouterr()
    run(data, tmp_path / "second", models["one"])
    assert computed(capsys) == 1
    for side in ("chosen", "rejected"):
        rows[2][f"{side}_input_ids"][0] = 79
    write_split(data, "preference", "train", rows)
    run(data, tmp_path / "third", models["one"])
    assert computed(capsys) == 2


def test_c19_another_model_is_computed_anew_and_the_first_is_kept(data, models, tmp_path, capsys):
    """C19: every weight counts, also a single one; and going back costs nothing."""
    run(data, tmp_path / "first", models["one"])
    capsys.readouterr()
    run(data, tmp_path / "second", models["other"])
    assert computed(capsys) == 2 * (NUM_TRAIN + NUM_VALIDATION)
    nearly = offline.causal(models["one"])
    with torch.no_grad():
        nearly.model.norm.weight[3] += 1e-3
    nearly.save_pretrained(tmp_path / "nearly")
    run(data, tmp_path / "third", models["one"], reference=str(tmp_path / "nearly"))
    assert computed(capsys) == 2 * (NUM_TRAIN + NUM_VALIDATION)
    run(data, tmp_path / "fourth", models["one"])
    assert computed(capsys) == 0


def test_c19_a_short_run_computes_the_rows_that_it_uses(data, models, tmp_path, capsys):
    """C19: three of 8 pairs, evaluated on 1 of 4: the others are computed when a run comes to them."""
    small = {"mini_batch_size": 1, "micro_batch_size": 4, "eval_iters": 1}
    run(data, tmp_path / "one", models["one"], max_steps=3, **small)
    assert computed(capsys) == 2 * (3 + 1)
    run(data, tmp_path / "two", models["one"], max_steps=5, **small)
    assert computed(capsys) == 2 * 2
    run(data, tmp_path / "all", models["one"], max_steps=11, **{**small, "eval_iters": 0})
    assert computed(capsys) == 2 * (NUM_TRAIN - 5 + NUM_VALIDATION - 1)
    run(data, tmp_path / "again", models["one"], max_steps=5, **small)
    assert computed(capsys) == 0
    assert same_losses(tmp_path / "two", tmp_path / "again")


@pytest.mark.parametrize(("shuffle", "steps"), [(True, 1), (True, 2), (True, 3), (True, 7), (False, 2)])
def test_rows_to_train_are_those_of_the_steps(shuffle, steps):
    """Each once, whether the run ends within the first epoch of 10 rows in steps of 4 or goes over it."""
    plan = SimpleNamespace(
        flags=SimpleNamespace(seed=3, shuffle=shuffle), total_steps=steps, global_batch=4, rank=0, world_size=1
    )
    used = {row for step in range(steps) for row in rows_of_step(step, 10, 4, seed=3, shuffle=shuffle)}
    assert Run.rows_to_train(plan, 10) == sorted(used)
    assert len(used) == min(10, 4 * steps)


def test_c19_a_row_that_was_not_read_is_an_error():
    """C19: never a zero, nor another row's value."""
    starts, lengths = np.array([0, 1, 3, 5]), np.array([1, 2, 2, 2])
    stored = ReferenceLogps([5, 2], np.arange(7, dtype=np.float32), starts, lengths, branches=2, computed=0)
    assert stored.sums([2, 5]).tolist() == [3 + 4, 5 + 6, 0, 1 + 2]
    assert stored.tokens([5]).tolist() == [0, 1, 2]
    for row in (0, 1, 3, -1):
        for read in (stored.sums, stored.tokens):
            with pytest.raises(KeyError, match=rf"rows \[{row}\]"):
                read([5, row])


def same_losses(*folders: Path) -> bool:
    one, other = ([line.get("train/loss") for line in metrics_of(folder)] for folder in folders)
    return one == other


def table_of(num: int, length: int) -> reference.Table:
    keys = np.random.default_rng(0).integers(256, size=(num, 16), dtype=np.uint8).view("S16")[:, 0]
    return reference.Table(keys, np.arange(num + 1) * length, np.arange(num * length, dtype=np.float32))


def own_bytes() -> int:
    """Memory of this process that no file holds."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def test_what_is_stored_stays_in_the_file(tmp_path):
    """C28: 40 MB of log-probabilities in a file take none of the process's memory, their 50,000 branches 6 MB."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux")
    table, path = table_of(50_000, 200), tmp_path / "stored.safetensors"
    reference._write(path, table, SimpleNamespace(say=pytest.fail))
    gc.collect()
    before = own_bytes()
    found = reference._read(path)
    places = found.places(table.keys, np.full(50_000, 200))
    rows = range(25_000)
    stored = ReferenceLogps(rows, found.flat, found.offsets[places], np.full(50_000, 200), branches=2, computed=0)
    assert own_bytes() - before < 12e6
    assert stored.tokens([7, 24_999]).tolist() == [*range(2800, 3200), *range(9_999_600, 10_000_000)]


def test_places_are_by_key_and_length():
    """Of equal keys the last one; a key with another number of tokens is not there."""
    keys = np.array([bytes([i]) * 16 for i in (3, 1, 2, 1)], "S16")
    table = reference.Table.of(keys, [np.ones(n, np.float32) for n in (2, 1, 0, 4)])
    wanted = np.array([bytes([i]) * 16 for i in (1, 2, 3, 4, 0, 3)], "S16")
    assert table.places(wanted, np.array([4, 0, 2, 1, 1, 1])).tolist() == [3, 2, 0, -1, -1, -1]
    assert reference._EMPTY.places(wanted, np.ones(6)).tolist() == [-1] * 6


def test_only_what_is_finite_is_kept():
    keys = np.array([bytes([i]) * 16 for i in (3, 1, 2)], "S16")
    parts = [np.array(x, np.float32) for x in ([1, 2], [], [3, np.nan, 4])]
    kept = reference.Table.of(keys, parts).finite()
    assert kept.keys.tolist() == keys[:2].tolist()
    assert kept.offsets.tolist() == [0, 2, 2]
    assert kept.flat.tolist() == [1, 2]


@pytest.mark.parametrize("offsets", [[0, 3, 2, 6], [0, 2, 4, 7], [1, 2, 4, 6], [-1, 2, 4, 6]], ids=str)
def test_c19_a_file_whose_places_are_wrong_is_not_used(tmp_path, offsets):
    """C16: though its checksum is right."""
    table, path = table_of(3, 2)._replace(offsets=np.array(offsets)), tmp_path / "stored.safetensors"
    reference._write(path, table, SimpleNamespace(say=pytest.fail))
    assert not len(reference._read(path).keys)
    reference._write(path, table_of(3, 2), SimpleNamespace(say=pytest.fail))
    assert len(reference._read(path).keys) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_c19_a_damaged_file_is_computed_anew(data, models, tmp_path, capsys, damage):
    """C16: found by its checksum; the numbers are those of the first run."""
    run(data, tmp_path / "first", models["one"])
    capsys.readouterr()
    (path,) = (Path(data) / "reference_logps").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-9] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    run(data, tmp_path / "second", models["one"])
    assert computed(capsys) == 2 * (NUM_TRAIN + NUM_VALIDATION)
    lines = [
        [line["train/loss"] for line in metrics_of(tmp_path / n) if "train/loss" in line] for n in ("first", "second")
    ]
    assert lines[0] == lines[1]


def test_c19_a_folder_that_cannot_be_written_is_done_without(data, models, tmp_path, capsys):
    (Path(data) / "reference_logps").write_text("a file in the folder's place")
    run(data, tmp_path / "first", models["one"])
    assert "will be computed again next time: " in capsys.readouterr().out


@pytest.mark.parametrize("explicit", [False, True])
def test_c19_stored_is_online(data, models, tmp_path, explicit):
    """C19: after a step that moved the policy, the loss equals that with the reference run beside it, to 1e-6 a nat;
    the reference is the start, or what --reference names."""
    given = {"reference": models["other"]} if explicit else {}
    run(data, tmp_path / "run", models["one"], shuffle=False, save_interval=1, **given)
    before = offline.model_before(tmp_path / "run", 2, models["one"])
    rows = [load_split(data, "preference", "train")[i] for i in range(4, 8)]
    with torch.no_grad():
        reference = offline.causal(models["other" if explicit else "one"])
        _, expected = offline.dpo_numbers(offline.causal(before), reference, rows)
    line = [line for line in metrics_of(tmp_path / "run") if "train/loss" in line][1]
    assert line["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)
    assert abs(line["train/loss"] - math.log(2)) > 1e-3


def test_c19_the_reference_is_not_in_memory_while_training(data, models, tmp_path, monkeypatch):
    """C19: at the first update one policy is alive, though two were loaded."""
    loaded, alive = [], []
    load, update = rlhf_dpo.load_policy, Step.update

    def remembering(*args, **kwargs):
        policy = load(*args, **kwargs)
        loaded.append(weakref.ref(policy))
        return policy

    def counting(self, *args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in loaded))
        return update(self, *args, **kwargs)

    monkeypatch.setattr(rlhf_dpo, "load_policy", remembering)
    monkeypatch.setattr(Step, "update", counting)
    run(data, tmp_path / "run", models["one"], reference=models["other"])
    assert len(loaded) == 2
    assert alive == [1, 1]


def test_no_reference_is_loaded_without_one(data, models, tmp_path, capsys):
    """--reference_free: nothing is computed or stored, and the rewards are the policy's own log-probabilities."""
    run(data, tmp_path / "run", models["one"], reference_free=True, max_steps=1, shuffle=False)
    assert "no reference" in capsys.readouterr().out
    assert not (Path(data) / "reference_logps").exists()
    rows = [load_split(data, "preference", "train")[i] for i in range(4)]
    _, expected = offline.dpo_numbers(offline.causal(models["one"]), None, rows)
    assert metrics_of(tmp_path / "run")[0]["train/chosen_reward"] == pytest.approx(expected["train/chosen_reward"])


def test_c31_held_out_curves_are_of_every_pair(data, models, tmp_path):
    """C31: on held-out rows, chosen and rejected change per token, margin, accuracy, and KL to the reference, as plain
    models compute them after two steps."""
    run(data, tmp_path / "run", models["one"], save_interval=2, eval_iters=0)
    rows = list(load_split(data, "preference", "validation"))
    policy, reference = offline.causal(tmp_path / "run" / "final"), offline.causal(models["one"])
    divergence = []
    with torch.no_grad():
        _, expected = offline.dpo_numbers(policy, reference, rows)
        for row in rows:
            for side in ("chosen", "rejected"):
                ids, n = row[f"{side}_input_ids"], row["prompt_len"]
                log_ratio = (offline.logps(reference, ids) - offline.logps(policy, ids))[n - 1 :]
                divergence.append(log_ratio.exp() - 1 - log_ratio)
    line = metrics_of(tmp_path / "run")[-1]
    for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp_change_per_token",
                 "rejected_logp_change_per_token"):  # fmt: skip
        assert line[f"val/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-4, abs=1e-5), name
    assert line["val/kl_k3_per_token"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-3)


def test_c20_a_device_without_validation_rows_adds_nothing(data, models):
    """C20: three devices, two rows: the third joins in the sums with zeros."""
    metrics = Metrics(SimpleNamespace(device=torch.device("cpu"), world_size=1))
    stub = SimpleNamespace(device=torch.device("cpu"), metrics=lambda: metrics, batches=lambda *_: iter(()))
    flags = quick_flags(DPOFlags, data, Path(), model_name=models["one"])
    split, policy = load_split(data, "preference", "validation"), load_policy(models["one"], flags)
    lengths = [len(split[0][f"{side}_input_ids"]) - split[0]["prompt_len"] for side in ("chosen", "rejected")]
    starts, zeros = np.array([0, lengths[0]]), np.zeros(sum(lengths), np.float32)
    stored = ReferenceLogps([0], zeros, starts, np.array(lengths), branches=2, computed=0)
    found = rlhf_dpo.evaluate(stub, flags, policy, split, stored)
    assert {"val/loss", "val/accuracy", "val/kl_k3_per_token"} <= set(metrics._sums)
    assert found == {}


@pytest.mark.parametrize(("allowed", "warns"), [(1e-4, True), (1e4, False)])
def test_c31_a_falling_chosen_response_is_warned_of(data, models, tmp_path, capsys, allowed, warns):
    """C31: a fall of more than --max_chosen_drop nats a token on held-out pairs."""
    for seed in range(4):  # a step up the loss of some pairs moves others down
        run(data, tmp_path / str(seed), models["one"], learning_rate=0.3, seed=seed, max_chosen_drop=allowed)
        change = metrics_of(tmp_path / str(seed))[-1]["val/chosen_logp_change_per_token"]
        warned = "warning: the chosen responses have lost" in capsys.readouterr().out
        assert warned == (-change > allowed)
        if change < -1e-3:
            break
    assert change < -1e-3
    assert warned == warns


def test_c31_an_sft_term_is_one_flag(data, models, tmp_path):
    """C31: --sft_coef pulls the chosen responses up."""
    final = []
    for coef in (0.0, 5.0):
        folder = tmp_path / str(coef)
        run(data, folder, models["one"], sft_coef=coef, max_steps=6)
        final.append(metrics_of(folder)[-1]["val/chosen_logp_change_per_token"])
    assert final[1] > final[0]
