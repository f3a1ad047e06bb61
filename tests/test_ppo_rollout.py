"""Rollouts: what is sampled, cut, scored and read by the critic, and the check before the first update."""

from __future__ import annotations

import pytest
import torch

from rlhf.advantages import RunningMoments
from rlhf.errors import UserError
from rlhf.experience import cut_after_stop, stack, value_index
from rlhf.experiment.run import Run
from rlhf.monitoring import check_first_rollout, missing_eos_fault
from rlhf.rlhf_ppo import PPOFlags, shaped_scores, targets_of
from rlhf.trees.forest import Forest, Tree
from tests.ppo import flags_of, make_world, set_up


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_value_of_a_token_is_the_critic_one_position_earlier(world, tmp_path):
    """P11: a critic that returns its own position gives P - 1, P, … for a prompt of P tokens, and the end state.

    A1: so it has read the whole prompt.
    """
    setting = set_up(flags_of(world, tmp_path / "run"))
    setting.roles.critic = lambda forest, at: forest.positions[at].float()
    for e in setting.collect([0, 1, 2, 3]):
        first = len(e.prompt) - 1
        assert e.values.tolist() == list(range(first, first + len(e.response) + 1))


@pytest.mark.parametrize(
    ("sampled", "kept", "ended"),
    [
        ([7, 5, 6, 5], [7], True),
        ([5, 6, 7, 8], [5, 6, 7], True),
        ([5, 6, 8, 7], [5, 6, 8, 7], True),
        ([5, 6, 8, 9], [5, 6, 8, 9], False),
        ([5, 7, 7, 7], [5, 7], True),
    ],
)
def test_responses_are_cut_after_the_first_stop_token(sampled, kept, ended):
    """P8: the stop token (7) at index 0, in the middle, last, absent; it is kept, and what follows is gone."""
    response = torch.tensor(sampled)
    length, end = cut_after_stop(response, (7, 99))
    assert (response[:length].tolist(), end) == (kept, ended)


def test_tokens_after_eos_reach_nothing(world, tmp_path, monkeypatch):
    """P8, P9: whatever was sampled after EOS, rows, scores, values and log-probabilities are the same."""
    from rlhf import experience as module

    setting = set_up(flags_of(world, tmp_path / "run", stop_at_eos=False))
    eos, generate = setting.prompts.tokenizer.eos_token_id, module.generate

    def collected(junk: int):
        def planted(*args, **options):
            samples = generate(*args, **options)
            for i, ids in enumerate(samples.response_ids):
                ids[i : i + 1] = eos
                ids[i + 1 :] = junk
            return samples

        monkeypatch.setattr(module, "generate", planted)
        return setting.collect([0, 1, 2])

    for one, other in zip(collected(20), collected(33), strict=True):
        assert one.response.tolist() == other.response.tolist()
        assert one.response[-1] == eos
        assert one.ended
        assert one.score == other.score
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.ref_logps, other.ref_logps)


def test_both_stop_modes_are_the_same_numbers(world, tmp_path):
    """P7: sampling a fixed length and cutting gives the tokens, masks, rewards and advantages of stopping at EOS."""
    rollouts = []
    for stop in (True, False):
        setting = set_up(flags_of(world, tmp_path / str(stop), stop_at_eos=stop))
        experiences = setting.collect()
        rollout = stack(experiences, setting.flags.max_new_tokens)
        scores = shaped_scores(rollout, setting.flags, RunningMoments())
        rollouts.append((experiences, rollout, scores, targets_of(rollout, scores, 0.05, setting.flags, 1)))
    (one, first, scores, targets), (other, second, other_scores, other_targets) = rollouts
    assert [e.response.tolist() for e in one] == [e.response.tolist() for e in other]
    assert [e.ended for e in one] == [e.ended for e in other]
    assert len({len(e.response) for e in one}) > 3
    assert 0 < sum(e.ended for e in one) < len(one)
    assert torch.equal(first.response_mask, second.response_mask)
    torch.testing.assert_close(scores, other_scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets.advantages, other_targets.advantages, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(targets.returns, other_targets.returns, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_sampling_and_training_agree_before_any_update(world, tmp_path, temperature):
    """C2, P1, P14: in train() mode, at any temperature and length, log-probabilities are the sampled ones."""
    setting = set_up(flags_of(world, tmp_path / "run", temperature=temperature))
    experiences = setting.collect()
    assert len({len(e.response) for e in experiences}) >= 3
    assert setting.roles.actor.training
    forest = Forest([Tree.of(e.prompt, e.response) for e in experiences])
    recomputed, _ = setting.roles.actor(forest, temperature=temperature)
    old, ref = (torch.cat([getattr(e, name) for e in experiences]) for name in ("old_logps", "ref_logps"))
    assert (recomputed - old).abs().max() <= 1e-4
    assert ((recomputed - old).exp() - 1).abs().max() <= 1e-4
    assert (old - ref).mean().abs() <= 1e-5
    check_first_rollout(setting.run, setting.roles, experiences, temperature)


def test_a_planted_mismatch_is_refused_and_named(world, tmp_path):
    """C35, P1, P5: a temperature left out, another reference, or a KL that is not 0 stops the run in one sentence."""
    setting = set_up(flags_of(world, tmp_path / "run", temperature=0.7))
    experiences = setting.collect([0, 1, 2, 3])

    def check(temperature=0.7):
        check_first_rollout(setting.run, setting.roles, experiences, temperature)

    check()
    with pytest.raises(UserError, match="sampling and training disagree on the same policy"):
        check(temperature=1.0)
    for e in experiences:
        e.ref_logps = e.ref_logps + 5e-5
    with pytest.raises(UserError, match="the KL of the first rollout is"):
        check()
    for e in experiences:
        e.ref_logps = e.ref_logps + 0.1
    with pytest.raises(UserError, match=r"policy and reference differ by 0\.1 nats a token"):
        check()


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"top_p": 0.9}, {"do_sample": False}])
def test_filters_that_training_does_not_mirror_are_refused(changes, monkeypatch, capsys):
    """P6, C2: top-k, top-p and greedy sampling end with status 2 and one sentence, before anything is read."""
    from rlhf.flags import launch

    arguments = ["rlhf_ppo.py", "--data_dir=nowhere", *(f"--{name}={value}" for name, value in changes.items())]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        launch(lambda flags: pytest.fail("the script ran"), PPOFlags)
    assert stopped.value.code == 2
    assert "PPO trains on the distribution that it samples from" in capsys.readouterr().err


def test_value_index_reads_before_each_token():
    """P11: packed positions for two trees, the second of which has no column for its end state."""
    forest = Forest(
        [Tree.of(torch.tensor([1, 2]), torch.tensor([3, 4])), Tree.of(torch.tensor([5]), torch.tensor([6]))]
    )
    assert value_index(forest, torch.tensor([True, False])).tolist() == [1, 2, 4, 3]


def test_each_process_draws_its_own_noise(world, tmp_path, monkeypatch):
    """A9: the same prompt on two devices gets different samples: those that one device draws for all places."""
    setting = set_up(flags_of(world, tmp_path / "run"))
    same = setting.prompts.prompt(0)
    setting.prompts.prompt = lambda row: same
    whole = setting.collect([0, 1, 2, 3])
    monkeypatch.setattr(Run, "gather", lambda run, items: items)
    setting.run.world_size = 2
    parts = []
    for rank in range(2):
        setting.run.rank = rank
        parts.append(setting.collect([0, 1, 2, 3]))
    merged = sorted([*parts[0], *parts[1]], key=lambda e: e.position)
    assert [e.response.tolist() for e in merged] == [e.response.tolist() for e in whole]
    assert len({tuple(e.response.tolist()) for e in whole}) == 4


def test_each_step_and_seed_draws_its_own_noise(world, tmp_path):
    """A9, A10: a prompt that comes again in a later pass gets another sample; another seed, others, and its neighbour's
    no sooner than a hash allows: seed 41's second step is not seed 42's first."""
    setting = set_up(flags_of(world, tmp_path / "run"))
    found = [setting.collect([0, 1, 2, 3])]
    setting.run.step_index = 1
    found += [setting.collect([0, 1, 2, 3]), setting.collect([0, 1, 2, 3], seed=7)]
    found.append(setting.collect([0, 1, 2, 3], seed=setting.flags.seed - 1))
    found = [[e.response.tolist() for e in experiences] for experiences in found]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_a_score_for_missing_eos_that_rewards_it_is_named(world, tmp_path):
    """Three responses end with -3, -2 and 2 (mean -1), one does not: -0.5 in its place beats two of the three."""
    rollout = stack(set_up(flags_of(world, tmp_path / "run")).collect([0, 1, 2, 3]), 16)
    rollout.scores = torch.tensor([-3.0, -2.0, 2.0, 9.0])
    rollout.ended = torch.tensor([True, True, True, False])
    fault = missing_eos_fault(rollout, "replace", -0.5)
    assert "scores -0.5" in fault
    assert "more than 67 % of those that end (mean -1.00)" in fault
    assert missing_eos_fault(rollout, "replace", -1.5) is None
    assert missing_eos_fault(rollout, "subtract", -0.5) is None
    rollout.ended[:] = False
    assert missing_eos_fault(rollout, "replace", -0.5) is None
