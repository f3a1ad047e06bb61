"""The script on single responses: what it measures and when, what it learns, and labels in any proportion."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.data.splits import load_split, write_split
from rlhf.errors import UserError
from rlhf.experiment.run import Step
from rlhf.models import forward
from rlhf.models.policy import Policy
from rlhf.rlhf_kto import KTOFlags, balance_of, main, train_partners
from rlhf.trees.batches import rows_of_step
from tests import offline
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags

LOSS_TYPES = ("kto", "apo_zero_unpaired", "bco")
EVERY_LOSS = pytest.mark.parametrize("loss_type", LOSS_TYPES)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path) -> str:
    return make_data(tmp_path / "data", num_train=8, num_validation=4)


def run(data: str, folder: Path, model: str, **given: Any) -> dict:
    return main(quick_flags(KTOFlags, data, folder, model_name=model, **given))


def relabel(data: str, name: str, labels: list[bool]) -> None:
    """Give the rows of a split these labels."""
    rows = [{**row, "label": label} for row, label in zip(load_split(data, "feedback", name), labels, strict=True)]
    write_split(data, "feedback", name, rows)


def trained_lines(folder: Path) -> list[dict[str, float]]:
    lines = [line for line in metrics_of(folder) if "train/loss" in line]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


@pytest.mark.parametrize(("loss_type", "good"), [*((name, None) for name in LOSS_TYPES), ("kto", 4), ("bco", 4)])
def test_c32_a_planted_rule_is_learnt(model, tmp_path, loss_type, good):
    """C32: good responses begin with Yes, bad ones with No. In 24 steps of 4, held-out accuracy goes from at most 70 %
    to above 95 %, and good ones above bad ones; also where four of five training rows are good. There BCO's delta is
    near the good rows' mean, so that it tells them apart (AUC) but not on either side of delta."""
    data = make_data(tmp_path / "data", num_train=40, num_validation=24)
    given = {"loss_type": loss_type}
    if good is not None:
        rows = [row for i, row in enumerate(load_split(data, "feedback", "train")) if row["label"] or i % 8 == 1]
        write_split(data, "feedback", "train", rows)
        given |= {"undesirable_weight": 4.0, "seed": 1} if loss_type == "kto" else {}
    summary = run(data, tmp_path / "run", model, max_steps=24, eval_interval=24, eval_iters=0, **given)
    start = metrics_of(tmp_path / "run")[0]
    assert start["val/accuracy"] <= 0.7
    assert summary["val/accuracy"] > 0.95 or (loss_type, good) == ("bco", 4)
    assert summary["val/auc"] > 0.99
    assert summary["val/chosen_reward"] > summary["val/rejected_reward"] + 0.5


def rows_through_the_model(monkeypatch) -> list[tuple[int, bool]]:
    """Fills with (tokens, has a graph) of every pass through the first layer, in order."""
    seen: list[tuple[int, bool]] = []
    original, trained = Policy.forward, forward.trained_states

    def ours(trunk, forest, **options):
        seen.append((forest.num_tokens, torch.is_grad_enabled()))
        return trained(trunk, forest, **options)

    def through(self, *args, **kwargs):
        layer = self.model.model.layers[0].mlp
        hook = layer.register_forward_pre_hook(lambda _, a: seen.append((a[0].shape[1], torch.is_grad_enabled())))
        try:
            with monkeypatch.context() as patch:
                patch.setattr(forward, "trained_states", ours)
                return original(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(Policy, "forward", through)
    return seen


@EVERY_LOSS
def test_each_token_goes_through_the_model_as_often_as_it_must(data, model, tmp_path, monkeypatch, loss_type):
    """Of four rows in file order, P prompt and R response tokens each. One micro-batch: all P + R with a graph; KTO
    then the R of the mismatched responses, on the prompts' keys. Two: what the second is held against comes before,
    without a graph: KTO its P and mismatched R, BCO its P and R, APO-zero nothing. The reference: P once for both R."""
    rows = [load_split(data, "feedback", "train")[i] for i in range(4)]
    p, r = [row["prompt_len"] for row in rows], [len(row["input_ids"]) - row["prompt_len"] for row in rows]
    halves = [slice(0, 2), slice(2, 4)]
    own = [sum(p[h]) + sum(r[h]) for h in halves]
    other = [r[3] + r[0], r[1] + r[2]]
    (Path(data) / "feedback_validation.pt").unlink()
    seen = rows_through_the_model(monkeypatch)

    given = {"loss_type": loss_type, "max_steps": 1, "shuffle": False, "micro_batch_size": 4}
    (Path(data) / "example_prompt.pt").unlink()
    run(data, tmp_path / "one", model, **given)
    reference = sum(own) + (sum(other) if loss_type == "kto" else 0)
    beside = [(sum(other), False)] if loss_type == "kto" else []
    assert seen == [(reference, False), (sum(own), True), *beside]

    seen.clear()
    run(data, tmp_path / "two", model, **{**given, "micro_batch_size": 2})
    before = {"kto": [(sum(p[halves[1]]) + other[1], False)], "bco": [(own[1], False)]}.get(loss_type, [])
    beside = [(other[0], False)] if loss_type == "kto" else []
    assert seen == [*before, (own[0], True), *beside, (own[1], True)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_rows", [9, 10])
def test_the_pairs_of_a_run_are_those_of_its_first_epoch(num_rows, shuffle):
    """A step's pairs hold its own rows' responses, each once, and no row meets its own, also where one is alone."""
    flags = KTOFlags(data_dir="d", seed=3, shuffle=shuffle)
    partners = train_partners(SimpleNamespace(global_batch=4), flags, num_rows)
    assert len(partners) == num_rows
    assert all(i != j for i, j in enumerate(partners))
    for step in range(3):
        rows = rows_of_step(step, num_rows, 4, seed=3, shuffle=shuffle)
        assert sorted(partners[i] for i in rows) == sorted(rows) or len(rows) == 1
        assert [partners[i] for i in rows[1:]] == rows[:-1]


def test_c19_every_response_to_a_prompt_is_computed_once(data, model, tmp_path, capsys):
    """C19: of 8 training and 4 validation rows their own responses and, for KTO, one other each, the same in every
    epoch; APO-zero and BCO need none of those; a run again, and one of four epochs, needs nothing."""

    def computed(name: str, **given: Any) -> int:
        run(data, tmp_path / name, model, **{"max_steps": 2, **given})
        return int(re.findall(r"(\d+) of its log-probabilities computed", capsys.readouterr().out)[-1])

    assert computed("bco", loss_type="bco") == 8 + 4
    assert computed("kto") == 8 + 4
    assert computed("again", micro_batch_size=1, learning_rate=1.0) == 0
    assert computed("longer", max_steps=8) == 0
    assert computed("apo", loss_type="apo_zero_unpaired") == 0


def test_c19_the_reference_may_be_another_model(data, model, tmp_path):
    """--reference: the numbers of the first step, with the policy beside another model run online."""
    other = make_model_dir(tmp_path / "other", seed=1)
    run(data, tmp_path / "run", model, reference=other, max_steps=1, shuffle=False)
    rows = [load_split(data, "feedback", "train")[i] for i in range(4)]
    with torch.no_grad():
        _, expected = offline.kto_numbers(offline.causal(model), offline.causal(other), rows)
    (line,) = trained_lines(tmp_path / "run")
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert abs(expected["train/chosen_reward"]) > 0.1


def test_a_row_alone_in_its_step_is_paired_with_the_next_rows_response(data, model, tmp_path):
    """--mini_batch_size=1: z0 of the second step is the log-ratio of row 2's response to row 1's prompt, or 0."""
    run(
        data,
        tmp_path / "run",
        model,
        mini_batch_size=1,
        max_steps=8,
        shuffle=False,
        save_interval=1,
        keep_checkpoints=0,
    )
    rows, estimates = list(load_split(data, "feedback", "train")), []
    reference = offline.causal(model)
    for step, line in enumerate(trained_lines(tmp_path / "run")):
        policy = offline.causal(offline.model_before(tmp_path / "run", step + 1, model))
        row, other = rows[step], rows[(step + 1) % 8]
        n, m = row["prompt_len"], other["prompt_len"]
        ids = torch.cat([row["input_ids"][:n], other["input_ids"][m:]])
        with torch.no_grad():
            estimates.append(sum((offline.logps(policy, ids) - offline.logps(reference, ids))[n - 1 :].tolist()))
        assert line["train/kl"] == pytest.approx(max(0.0, estimates[-1]), abs=1e-3)
    assert max(estimates) > 0.1 > -0.1 > min(estimates)


@EVERY_LOSS
def test_one_label_alone_is_trained_on_and_said(data, model, tmp_path, capsys, loss_type):
    """All good: no number is NaN, none speaks of bad responses or of telling them apart, and rewards rise."""
    relabel(data, "train", [True] * 8)
    relabel(data, "validation", [True] * 4)
    summary = run(data, tmp_path / "run", model, loss_type=loss_type, max_steps=6, eval_interval=3, save_interval=3)
    assert "8 good and 0 bad responses: with one label alone, nothing holds the policy" in capsys.readouterr().out
    lines = metrics_of(tmp_path / "run")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    names = {name for line in lines for name in line}
    assert not {name for name in names if "rejected" in name or "margin" in name or "auc" in name} - {
        "train/num_rejected"
    }
    assert all(
        line["train/num_rejected"] == 0 and line["train/num_chosen"] == 4 for line in trained_lines(tmp_path / "run")
    )
    assert summary["val/chosen_reward"] > 0.05
    best = json.loads((tmp_path / "run" / "checkpoints" / "best" / "best.json").read_text())
    assert best["metric"] == "val/loss"


def test_a_step_of_one_label_leaves_the_other_out(data, model, tmp_path):
    """Four good rows, then four bad ones, in file order."""
    relabel(data, "train", [True] * 4 + [False] * 4)
    run(data, tmp_path / "run", model, shuffle=False)
    first, second = trained_lines(tmp_path / "run")
    assert ("train/chosen_reward" in first, "train/rejected_reward" in first) == (True, False)
    assert ("train/chosen_reward" in second, "train/rejected_reward" in second) == (False, True)
    assert not {"train/margin"} & {*first, *second}
    assert all(math.isfinite(value) for line in (first, second) for value in line.values())


@pytest.mark.parametrize(
    ("labels", "weights", "words"),
    [
        ([True] * 4 + [False] * 4, {}, "4 good and 4 bad responses$"),
        ([True] * 4 + [False] * 3, {}, "4 good and 3 bad responses$"),
        ([True] * 6 + [False] * 2, {}, "proportion, 3, between 1 and 1.33: --undesirable_weight=3$"),
        ([True] * 2 + [False] * 6, {}, "proportion, 0.333, between 1 and 1.33: --desirable_weight=3$"),
        ([True] * 2 + [False] * 6, {"desirable_weight": 3.0}, "2 good and 6 bad responses$"),
        ([True] * 6 + [False] * 2, {"undesirable_weight": 0.0}, "--undesirable_weight=3$"),
        ([True] * 6 + [False] * 2, {"loss_type": "bco"}, "6 good and 2 bad responses$"),
        ([False] * 2, {}, "one label alone"),
    ],
)
def test_the_weights_that_balance_are_named(labels, weights, words):
    """w_D good / (w_U bad) in [1, 4/3]; the remedy brings it to 1."""
    assert re.search(words, balance_of(KTOFlags(data_dir="d", **weights), torch.tensor(labels)))


def test_an_empty_response_is_refused_by_its_row(data, model, tmp_path):
    """C12: it never reaches a loss."""
    rows = list(load_split(data, "feedback", "train"))
    rows[3]["input_ids"] = rows[3]["input_ids"][: rows[3]["prompt_len"]]
    path = Path(data) / "feedback_train.pt"
    torch.save(rows, path)
    with pytest.raises(UserError, match=r"feedback_train.pt, row 3"):
        run(data, tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


class _Killed(BaseException):
    pass


def test_c4_bcos_running_mean_is_in_the_checkpoint(data, model, tmp_path, monkeypatch):
    """C4: killed in the fourth step, resumed after the second: bit for bit the same weights and deltas."""
    options = {"loss_type": "bco", "max_steps": 4, "mini_batch_size": 3, "save_interval": 2, "eval_interval": 2}
    run(data, tmp_path / "straight", model, **options)
    update = Step.update

    def killed(self, *args, **kwargs):
        if self.run.step_index == 3:
            raise _Killed
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "update", killed)
        with pytest.raises(_Killed):
            run(data, tmp_path / "broken", model, **options)
    state = json.loads((tmp_path / "broken" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["extra"]["rewards_so_far"]["count"] == 6
    run(data, tmp_path / "broken", model, **options, resume=True)
    straight, resumed = tmp_path / "straight", tmp_path / "broken"
    assert trained_lines(straight) == trained_lines(resumed)
    assert abs(trained_lines(straight)[-1]["train/delta"]) > 1e-3
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_c25_a_skipped_step_leaves_no_trace_in_the_running_mean(data, model, tmp_path, monkeypatch):
    """C25: rewards of a step whose loss is not finite are taken back."""
    backward = Step.backward

    def spoiled(self, loss, **options):
        return backward(self, loss + float("inf") if self.run.step_index == 1 else loss, **options)

    monkeypatch.setattr(Step, "backward", spoiled)
    options = {"loss_type": "bco", "max_steps": 3, "mini_batch_size": 2, "save_interval": 1, "keep_checkpoints": 0}
    run(data, tmp_path / "run", model, skip_nonfinite_steps=1, **options)
    states = [
        json.loads((tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
        for step in (1, 2)
    ]
    assert states[0]["extra"]["rewards_so_far"] == states[1]["extra"]["rewards_so_far"]
    assert states[0]["extra"]["rewards_so_far"]["count"] == 2


@pytest.mark.parametrize(("allowed", "warns"), [(1e-6, True), (1e4, False)])
def test_c31_falling_good_responses_are_warned_of(data, model, tmp_path, capsys, allowed, warns):
    """C31: by more than --max_chosen_drop nats a token on held-out rows, here labelled the wrong way round."""
    relabel(data, "train", [False] * 8)
    run(data, tmp_path / "run", model, max_chosen_drop=allowed, max_steps=4)
    assert metrics_of(tmp_path / "run")[-1]["val/chosen_logp_change_per_token"] < -1e-3
    assert ("warning: the good responses have lost" in capsys.readouterr().out) == warns
