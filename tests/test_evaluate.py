"""rlhf_evaluate.py: models side by side, with numbers of prompts, intervals and seeds."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.loading import load_policy, load_scorer, save_model
from rlhf.reports import interval_of, paired_p_value
from rlhf.rlhf_evaluate import EvaluateFlags, main, named_models
from tests.splits import make_data, make_model_dir, tokenizer_for


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data with a test split, a policy `one`, another policy `two`, and a reward model."""
    root = tmp_path_factory.mktemp("world")
    data = make_data(root / "data")
    one, two = make_model_dir(root / "one", "llama"), make_model_dir(root / "two", "llama", seed=1)
    scorer = load_scorer(str(one), ModelFlags(), new_head=True)
    save_model(scorer, tokenizer_for(), root / "reward")
    return {"data": str(data), "one": str(one), "two": str(two), "reward": str(root / "reward")}


def flags_of(world, **changes) -> EvaluateFlags:
    settings = {
        "data_dir": world["data"],
        "models": [f"one={world['one']}", f"two={world['two']}"],
        "rm_experiment_dir": world["reward"],
        "num_prompts": 4,
        "max_new_tokens": 6,
        "precision": "32-true",
        "accelerator": "cpu",
        "split": "validation",
    }
    return EvaluateFlags(**{**settings, **changes})


def test_three_seeds_with_mean_and_interval_in_one_command(world, tmp_path):
    """W5: at least three seeds a prompt by default, a mean and an interval over prompts, a paired p-value."""
    flags = flags_of(world, output=str(tmp_path / "out.json"))
    assert flags.num_seeds >= 3
    results = main(flags)
    for name in ("one", "two"):
        for key in ("reward", "kl_to_baseline", "win_rate"):
            found = results[name][key]
            assert found["n"] == 4
            assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["answers"]["two"]) == 4 * flags.num_seeds
    assert len(set(written["answers"]["two"])) > 4, "the seeds of a prompt give different answers"
    assert results["reward_model"]["n"] == 6


def test_a_model_against_itself(world):
    """W5, C30: against itself a model has KL 0, ties everywhere, p = 1, and no margin in its implicit rewards."""
    results = main(flags_of(world, models=[f"a={world['one']}", f"b={world['one']}"]))
    assert results["b"]["kl_to_baseline"]["mean"] == pytest.approx(0, abs=1e-4)
    assert results["b"]["win_rate"]["mean"] == 0.5
    assert results["b"]["win_rate"]["p_value"] == 1.0
    assert results["b"]["implicit_accuracy"]["accuracy"] == 0
    assert results["a"]["reward"] == results["b"]["reward"]


def test_perplexity_is_that_of_the_plain_model(world):
    """Perplexity equals exp of the mean cross-entropy of transformers' own logits over the response tokens."""
    from rlhf.data.splits import load_split

    results = main(flags_of(world, rm_experiment_dir=None))
    model = load_policy(world["one"], ModelFlags(), trainable=False).model
    total, count = 0.0, 0
    for row in load_split(world["data"], "finetune", "validation"):
        logits = model(row["input_ids"][None]).logits[0, :-1]
        targets = row["targets"][1:]
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    assert results["one"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert "reward" not in results["one"]


@pytest.mark.parametrize(
    ("models", "message"),
    [(["plain"], "name=folder"), (["a=x", "a=x"], "given twice"), (["a=./none"], "no such folder")],
)
def test_mistakes_in_models(models, message, world):
    models = [m.replace("=x", f"={world['one']}") for m in models]
    with pytest.raises(UserError, match=message):
        named_models(models)


def test_baseline_must_be_one_of_the_models(world):
    with pytest.raises(UserError, match="none of the models"):
        main(flags_of(world, baseline="three"))


def test_interval_and_p_value_by_hand():
    """Values 1, 2, 3: mean 2, deviation 1, error 1.96 / sqrt(3) = 1.1316; z = 2 sqrt(3) = 3.4641, p = 0.000532."""
    found = interval_of(torch.tensor([1.0, 2.0, 3.0]))
    assert found["interval"] == pytest.approx([2 - 1.1316, 2 + 1.1316], abs=1e-4)
    assert paired_p_value(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(0.000532, abs=1e-6)
