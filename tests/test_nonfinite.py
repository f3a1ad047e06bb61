"""C25: what is not finite is named, with its rows, and reaches neither weights nor the state of the optimiser."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf import rlhf_dpo, rlhf_grpo, rlhf_kto, rlhf_online_dpo, rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.errors import UserError
from rlhf.experiment.finite import Sighting, guilty
from rlhf.models.policy import Policy, Scorer
from rlhf.rollouts import Sampling, choose, generate
from rlhf.trees.forest import Forest, Tree
from tests import grpo, ppo
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags
from tests.tiny import make_model

NAN, INF = float("nan"), float("inf")
OFFLINE = {
    "sft": (rlhf_sft, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo, rlhf_dpo.DPOFlags),
    "kto": (rlhf_kto, rlhf_kto.KTOFlags),
}
ONLINE = ("ppo", "grpo", "online_dpo")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("nonfinite")
    return {
        "data": make_data(root / "data"),
        "llama": make_model_dir(root / "llama"),
        "ppo": ppo.make_world(root / "ppo"),
        "grpo": grpo.make_world(root / "grpo"),
    }


def settings_of(lab: dict[str, Any], script: str, folder: Path, **given: Any) -> tuple[Callable, Any]:
    """`main` and flags of a small run of any script: 4 rows a step in file order, 2 at once."""
    given = {"micro_batch_size": 2, "shuffle": False, "lr_schedule": "constant", **given}
    if script in OFFLINE:
        module, flags = OFFLINE[script]
        return module.main, quick_flags(flags, lab["data"], folder, model_name=lab["llama"], **given)
    if script == "ppo":
        return rlhf_ppo.main, ppo.flags_of(lab["ppo"], folder, **given)
    if script == "grpo":
        return rlhf_grpo.main, grpo.flags_of(lab["grpo"], folder, **given)
    world = lab["grpo"]
    options = {"sft_experiment_dir": world.sft, "reward": world.reward("distinct"), "rollout_size": 4}
    return rlhf_online_dpo.main, quick_flags(
        rlhf_online_dpo.OnlineDPOFlags, world.data, folder, **{**options, "max_new_tokens": 8, **given}
    )


def trained_lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics_of(folder) if "perf/step_seconds" in line]


def spoil_training(monkeypatch, role: type, *, at: int, value: float) -> None:
    """In the `at`-th pass with a graph, put `value` among what the role gives for the micro-batch's second tree."""
    forward, calls = role.forward, []

    def spoiled(self, forest, *args, **options):
        found = forward(self, forest, *args, **options)
        if not torch.is_grad_enabled():
            return found
        calls.append(1)
        if len(calls) != at:
            return found
        numbers = found[0] if isinstance(found, tuple) else found
        index = forest.target_index if isinstance(found, tuple) else args[0]
        mask = torch.zeros_like(numbers, dtype=torch.bool)
        mask[(index >= forest.trees[1][0]).nonzero()[0]] = True
        numbers = numbers.masked_fill(mask, value)
        return (numbers, *found[1:]) if isinstance(found, tuple) else numbers

    monkeypatch.setattr(role, "forward", spoiled)


NAMED = {
    # In the order of the file, a step holds the rows 0 to 3, and a micro-batch two of them: the second pass the rows
    # 2 and 3, whose second tree is spoiled. KTO sees its later cuts first, without a graph.
    "sft": (Policy, 2, r"the log-probabilities are not finite \(training rows \[3\]\)"),
    "rm": (Scorer, 2, r"the scores are not finite \(training rows \[3\]\)"),
    "dpo": (Policy, 2, r"the log-probabilities are not finite \(training rows \[3\]\)"),
    "kto": (Policy, 2, r"the log-probabilities are not finite \(training rows \[3\]\)"),
    "ppo": (Policy, 1, r"of the actor is \S+: the log-probabilities are not finite \(training rows \[\d+\]\)"),
    "ppo-critic": (Scorer, 1, r"of the critic is \S+: the values are not finite \(training rows \[\d+\]\)"),
    "grpo": (Policy, 1, r"the log-probabilities are not finite \(training rows \[\d+\]\)"),
    "online_dpo": (Policy, 1, r"the log-probabilities are not finite \(training rows \[\d+\]\)"),
}


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("value", [NAN, -INF])
def test_c25_every_script_names_the_quantity_and_the_row(lab, tmp_path, monkeypatch, case, value):
    """C25: one number of one row of a micro-batch: the run stops before the step, and names that row alone.

    PPO clamps its log-ratio: with a log-probability of -inf the loss is finite, and the step is stopped all the same.
    """
    role, at, what = NAMED[case]
    main, flags = settings_of(lab, case.partition("-")[0], tmp_path)
    spoil_training(monkeypatch, role, at=at, value=value)
    if value == -INF and case in ("ppo", "grpo"):
        what = what.replace(r"of the actor is \S+: ", "")
    with pytest.raises(UserError, match=what):
        main(flags)
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("script", [*OFFLINE, *ONLINE])
def test_c25_a_skipped_step_leaves_weights_and_optimiser_as_they_were(lab, tmp_path, monkeypatch, script):
    """C25: the second of three steps is spoiled: after two steps, weights and the optimisers' state are those after
    one, bit for bit, and after three they are not; PPO's other optimiser goes on."""
    options = {"save_interval": 1, "keep_checkpoints": 0, "max_steps": 3, "skip_nonfinite_steps": 1}
    main, flags = settings_of(lab, script, tmp_path, micro_batch_size=4, **options)
    spoil_training(monkeypatch, Policy if script != "rm" else Scorer, at=2, value=NAN)
    main(flags)
    assert [line.get("train/skipped_steps") for line in trained_lines(tmp_path)] == [None, 1, 1]
    states = []
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        (name,) = [p.name for p in folder.glob("*optimizer.pt") if "critic" not in p.name]
        optimizer = torch.load(folder / name, weights_only=True)["state"]
        numbers = {f"{i}.{k}": x for i, state in optimizer.items() for k, x in state.items()}
        states.append({**numbers, **load_file(folder / "model" / "model.safetensors")})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert not all(torch.equal(x, states[1][name]) for name, x in final.items())


def test_c25_rows_in_which_only_the_gradient_is_not_finite():
    """A square root at 0: the loss is finite and the gradient is not; of three trees the second is named."""
    forest = Forest([Tree.of(torch.tensor([1, 2]), torch.tensor([3, 4])) for _ in range(3)])
    values = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0], requires_grad=True) * 1.0
    sighting = Sighting("log-probabilities", values, [8, 5, 9], forest)
    values.sqrt().sum().backward()
    assert guilty([sighting]) == [("gradients of the log-probabilities", [5])]


def test_c25_rows_of_dense_quantities_and_of_whole_micro_batches():
    """Two numbers a row; packed positions; (rows, T); a scalar that belongs to all."""
    pairs = Sighting("log-probabilities", torch.tensor([0.0, 0.0, INF, 0.0]), [4, 2])
    table = Sighting("losses", torch.tensor([[0.0, NAN], [0.0, 0.0]]), [4, 2])
    assert guilty([pairs]) == [("log-probabilities", [2])]
    forest = Forest([Tree.of(torch.tensor([1]), torch.tensor([3, 4])) for _ in range(2)])
    values = Sighting("values", torch.tensor([0.0, 0.0, NAN]), [4, 2], forest, torch.tensor([0, 2, 3]))
    assert guilty([values]) == [("values", [2])]  # read at the first token of the second tree
    assert guilty([table, Sighting("loss", torch.tensor(NAN), [4, 2])]) == [("losses", [4]), ("loss", [2, 4])]


def test_c25_no_step_is_looked_into_while_all_is_finite(lab, tmp_path, monkeypatch):
    """C25: a healthy run reads loss, check and norm from the device once a step, and nothing else is computed."""
    from rlhf.experiment import steps

    for name in ("guilty", "first_nonfinite", "names_of"):
        monkeypatch.setattr(steps, name, lambda *_: pytest.fail("looked into a healthy step"))
    main, flags = settings_of(lab, "sft", tmp_path)
    main(flags)


def test_c25_weights_that_are_not_finite_cannot_be_skipped(lab, tmp_path, monkeypatch):
    """A model that is broken itself is named as that, whatever --skip_nonfinite_steps allows."""
    update = rlhf_sft.Run.steps

    def broken(self, num_rows):
        for step in update(self, num_rows):
            next(self.modules[0].parameters()).data[0, 0] = INF
            yield step

    monkeypatch.setattr(rlhf_sft.Run, "steps", broken)
    main, flags = settings_of(lab, "sft", tmp_path, skip_nonfinite_steps=9)
    with pytest.raises(UserError, match=r"step 0: the loss is nan, and so is the weight model.embed_tokens.weight"):
        main(flags)


# ----------------------------------------------------------------------------------------- rollouts and evaluations


def spoil_collected(monkeypatch, what: str, *, step: int) -> None:
    """Make one number of the third experience of a step's rollout NaN, before it is looked at."""
    from rlhf import experience

    numbers_of = experience._numbers_of

    def spoiled(experiences):
        found = numbers_of(experiences)
        if what in found and spoiled.step == step:
            x = found[what][2]
            x.view(-1)[-1] = NAN
            if what == "rewards":
                experiences[2].score = NAN
        spoiled.step += 1
        return found

    spoiled.step = 0
    monkeypatch.setattr(experience, "_numbers_of", spoiled)


MEASURED = {
    "ppo": ("log-probabilities", "rewards", "reference log-probabilities", "values"),
    "grpo": ("log-probabilities", "rewards"),
    "online_dpo": ("log-probabilities", "rewards", "reference log-probabilities"),
}


@pytest.mark.parametrize(("script", "what"), [(script, what) for script in ONLINE for what in MEASURED[script]])
def test_c25_a_rollout_that_is_not_finite_is_named_or_skipped(lab, tmp_path, monkeypatch, script, what):
    """C25: the run stops with the row of the prompt; with --skip_nonfinite_steps=1 the next step trains."""
    main, flags = settings_of(lab, script, tmp_path / "stop")
    row = 2 if script == "ppo" else (0 if script == "grpo" else 1)
    with monkeypatch.context() as patch:
        spoil_collected(patch, what, step=0)
        with pytest.raises(
            UserError, match=rf"step 0: the {what} of responses to rows \[{row}\] of .*_train.pt are not"
        ):
            main(flags)
    spoil_collected(monkeypatch, what, step=0)
    main, flags = settings_of(lab, script, tmp_path / "skip", skip_nonfinite_steps=1, max_steps=2)
    main(flags)
    first, second = trained_lines(tmp_path / "skip")
    assert first["train/skipped_steps"] == second["train/skipped_steps"] == 1
    assert "train/score" not in first
    assert math.isfinite(second["train/score"])


@pytest.mark.parametrize("script", ONLINE)
def test_c25_a_skipped_rollout_does_not_take_its_checkpoint_along(lab, tmp_path, monkeypatch, script):
    """C4, C25: the checkpoint before the second rollout, which is skipped, is there, and does not count it yet: a run
    that goes on from it comes to that rollout again, and ends with the same count."""
    main, flags = settings_of(lab, script, tmp_path, skip_nonfinite_steps=1, max_steps=2, save_interval=1)
    with monkeypatch.context() as patch:
        spoil_collected(patch, "log-probabilities", step=1)
        main(flags)
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert json.loads((folder / "state.json").read_text())["extra"]["skipped_steps"] == 0
    assert [line.get("train/skipped_steps") for line in trained_lines(tmp_path)] == [None, 1]


def test_c25_targets_that_overflow_leave_no_trace_in_the_running_moments(lab, tmp_path, monkeypatch):
    """C25: advantages that are not finite skip the step; the running moments forget its scores, and beta stays."""
    targets_of, states = rlhf_ppo.targets_of, []
    save = rlhf_ppo.Run.save_if_due

    def spoiled(*args, **options):
        targets = targets_of(*args, **options)
        if not states[1:]:
            targets.returns[1, 0] = INF
        return targets

    def watched(self, models, optimizers, tokenizer, kept=None):
        states.append({name: dict(kept[name].state_dict()) for name in ("kl", "score_moments")})
        return save(self, models, optimizers, tokenizer, kept)

    monkeypatch.setattr(rlhf_ppo, "targets_of", spoiled)
    monkeypatch.setattr(rlhf_ppo.Run, "save_if_due", watched)
    options = {"normalize_rewards": True, "adaptive_kl_coeff": True, "skip_nonfinite_steps": 1, "max_steps": 3}
    main, flags = settings_of(lab, "ppo", tmp_path, **options)
    main(flags)
    assert states[0] == states[1]
    assert states[1]["score_moments"]["count"] == 0
    assert states[2]["score_moments"]["count"] == 4
    assert states[2]["kl"] != states[1]["kl"]


def test_c25_logits_that_are_nan_give_ids_of_the_vocabulary_and_nan():
    """Sampling on goes to the end, so that the rollout can be named; a token that does not exist would end the
    process on a GPU. 300 tokens leave the last block of the vocabulary half empty."""
    logits = torch.zeros(3, 300)
    logits[1] = NAN
    logits[2, 5] = INF
    for sampling in (Sampling(), Sampling(top_k=7), Sampling(top_p=0.5), Sampling(do_sample=False)):
        ids, logps = choose(logits.clone(), sampling, torch.full((3,), 0.999))
        assert ids.max() < 300
        assert ids.min() >= 0
        assert logps.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_c25_a_broken_model_can_be_sampled(architecture):
    """In the loop and through transformers' own `generate`: all log-probabilities are NaN, and nothing is raised."""
    model = make_model(architecture)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(NAN)
    policy = Policy(model, uses_trees=architecture == "llama")
    samples = generate(policy, [torch.tensor([3, 4, 5])], Sampling(max_new_tokens=3))
    assert samples.token_logps[0].isnan().all()


@pytest.mark.parametrize("script", ["sft", "rm", "dpo", "kto", "ppo"])
def test_c25_an_evaluation_that_is_not_finite_is_reported_and_not_fatal(lab, tmp_path, monkeypatch, capsys, script):
    """C25: every evaluation is NaN: the run goes on, says so, keeps no best weights, and writes no NaN into a file."""
    role = Scorer if script == "rm" else Policy
    forward, evaluate, evaluating = role.forward, rlhf_sft.Run._evaluate, []

    def spoiled(self, *args, **options):
        found = forward(self, *args, **options)
        if not evaluating:
            return found
        return (found[0] * NAN, *found[1:]) if isinstance(found, tuple) else found * NAN

    def watched(self, assess):
        evaluating.append(1)
        evaluate(self, assess)
        evaluating.clear()

    monkeypatch.setattr(role, "forward", spoiled)
    monkeypatch.setattr(rlhf_sft.Run, "_evaluate", watched)
    options = {"eval_interval": 1, "save_interval": 1, "max_steps": 1, "eval_iters": 1}
    main, flags = settings_of(lab, script, tmp_path, **options)
    main(flags)
    printed = capsys.readouterr().out
    assert "warning: " in printed
    assert "not finite" in printed
    assert not (tmp_path / "checkpoints" / "best").exists()

    def refuse(constant):
        raise AssertionError(constant)

    for path in tmp_path.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("script", ["dpo", "kto"])
def test_c25_a_reference_that_is_not_finite_stops_the_run_before_its_first_step(lab, tmp_path, monkeypatch, script):
    """C25: its rows are named; with --skip_nonfinite_steps their steps are skipped, and nothing of it is stored."""
    data = make_data(tmp_path / "data")
    calls = []
    forward = Policy.forward

    def spoiled(self, forest, **options):
        logps, other = forward(self, forest, **options)
        calls.append(1)
        if len(calls) == 1:  # the first micro-batch of the reference
            mask = torch.zeros_like(logps, dtype=torch.bool)
            mask[0] = True
            logps = logps.masked_fill(mask, NAN)
        return logps, other

    monkeypatch.setattr(Policy, "forward", spoiled)
    lab = {**lab, "data": data}
    main, flags = settings_of(lab, script, tmp_path / "stop")
    with pytest.raises(
        UserError, match=r"the reference's log-probabilities of rows \[0\] of .*_train.pt are not finite"
    ):
        main(flags)
    assert not (tmp_path / "stop").exists()
    for path in (Path(data) / "reference_logps").glob("*.safetensors"):
        assert load_file(path)["logps"].isfinite().all()
    calls.clear()
    for path in (Path(data) / "reference_logps").glob("*.safetensors"):
        path.unlink()
    main, flags = settings_of(lab, script, tmp_path / "skip", skip_nonfinite_steps=1)
    main(flags)
    assert trained_lines(tmp_path / "skip")[-1]["train/skipped_steps"] == 1


@pytest.mark.slow
def test_c25_two_processes_stop_together_with_one_sentence(lab, tmp_path):
    """C25: a reward of one row is infinite, and one of the two processes has it: both end with status 2 and name it."""
    body = "def score(prompts, responses, rows):\n    return [float('inf') if r['row'] == 3 else 0.5 for r in rows]\n"
    (tmp_path / "score.py").write_text(body, encoding="utf-8")
    options = {"devices": "2", "strategy": "ddp", "mini_batch_size": 2, "rollout_size": 2, "shuffle": False}
    options |= {"reward": [f"function:{tmp_path}/score.py:score"]}
    flags = grpo.flags_of(lab["grpo"], tmp_path / "run", **options)
    (tmp_path / "flags.json").write_text(json.dumps(dataclasses.asdict(flags)), encoding="utf-8")
    script = Path(rlhf_grpo.__file__)
    printed = ppo.on_two_processes(script, f"--args_file={tmp_path / 'flags.json'}", status=2)
    for text in printed:
        assert "error: step 0: the reward score is inf for row 3 of" in text
        assert "Traceback" not in text
