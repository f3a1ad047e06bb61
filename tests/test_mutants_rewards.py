"""Mutants of rewards; see test_mutants.py."""

from __future__ import annotations

import os

import pytest

from tests.test_mutants import Mutant, assert_not_stale, assert_noticed

REWARDS = "tests/test_rewards.py::"
FOREIGN = "tests/test_rewards_foreign.py::"

MUTANTS = [
    # The first number instead of the last, a minus that takes away, a reference that is not looked at.
    Mutant("rlhf/rewards/rules.py", "Decimal(found[-1]", "Decimal(found[0]", (REWARDS + "test_last_number_by_hand",)),
    Mutant("rlhf/rewards/rules.py", r"(?:(?<![\w.)\]}])[-+−])?", "[-+−]?", (REWARDS + "test_last_number_by_hand",)),
    Mutant("rlhf/rewards/rules.py", "abs(given - right)", "given - right", (REWARDS + "test_numeric_by_hand",)),
    Mutant("rlhf/rewards/rules.py", "flags=re.DOTALL", "flags=0", (REWARDS + "test_rules_from_their_words",)),
    Mutant(
        "rlhf/rewards/rules.py",
        'not row["reference"].strip()',
        "False",
        (REWARDS + "test_a_row_that_no_rule_can_check_is_named",),
    ),
    Mutant(
        "rlhf/rewards/rules.py",
        "range(len(words) - n + 1)",
        "range(len(words) - n)",
        (REWARDS + "test_repetition_by_hand",),
    ),
    Mutant(
        "rlhf/rewards/rules.py",
        "(start - num_tokens) / (end - start)",
        "(start - num_tokens) / end",
        (REWARDS + "test_lengths_by_hand",),
    ),
    Mutant("rlhf/rewards/rules.py", r"(?<!\w){re", "{re", (REWARDS + "test_keywords_are_whole_words",)),
    # A weight left out of the sum or of the tokens, a weight in the parts, a failure kept to oneself.
    Mutant("rlhf/rewards/mix.py", "total += part.weight * torch", "total += torch", (REWARDS + "test_mix_by_hand",)),
    Mutant(
        "rlhf/rewards/mix.py",
        "token[i] += part.weight * scores",
        "token[i] += scores",
        (REWARDS + "test_rewards_of_tokens_by_hand",),
    ),
    Mutant("rlhf/rewards/mix.py", "self.gather([failure])", "[failure]", (REWARDS + "test_devices_fail_together",)),
    Mutant(
        "rlhf/rewards/mix.py",
        "prompts=prompts)",
        "prompts=self.prompts)",
        (REWARDS + "test_another_split_has_its_own_references",),
    ),
    Mutant(
        "rlhf/rewards/mix.py",
        "not abs(value) <= LARGEST",
        "abs(value) > LARGEST",
        (FOREIGN + "test_what_is_no_finite_number_for_each_response_is_named",),
    ),
    Mutant(
        "rlhf/rewards/mix.py",
        "len(returned) != len(answers)",
        "len(returned) < len(answers)",
        (FOREIGN + "test_a_server_that_answers_something_else_is_named_and_not_asked_again",),
    ),
    # The token before the one that completes a range; scores at one token that overwrite each other.
    Mutant(
        "rlhf/rewards/answers.py",
        "ids[:count]",
        "ids[: count + 1]",
        (REWARDS + "test_a_character_of_several_tokens_ends_with_the_last_of_them",),
    ),
    Mutant(
        "rlhf/rewards/mix.py",
        "int(item[1]))] += _finite",
        "int(item[1]))] = _finite",
        (REWARDS + "test_rewards_of_ranges_stand_at_the_token_that_ends_them",),
    ),
    # A reward model that reads the EOS of a cut response, a limit without effect, one attempt too few.
    Mutant(
        "rlhf/rewards/models.py",
        "ended=ended)",
        "ended=True)",
        (REWARDS + "test_reward_models_with_other_tokenizers",),
    ),
    Mutant(
        "rlhf/rewards/functions.py",
        "thread.join(seconds)",
        "thread.join()",
        (FOREIGN + "test_a_late_function_is_named_at_the_limit",),
    ),
    Mutant(
        "rlhf/rewards/functions.py",
        "[dict(answers.rows[i]) for",
        "[answers.rows[i] for",
        (REWARDS + "test_a_function_sees_texts_and_the_rows_of_the_data",),
    ),
    Mutant(
        "rlhf/rewards/endpoint.py",
        "range(ATTEMPTS - 1)",
        "range(ATTEMPTS - 2)",
        (FOREIGN + "test_a_server_that_is_not_there_is_tried_again_and_named",),
    ),
    Mutant(
        "rlhf/rewards/endpoint.py",
        "if error.code not in BUSY:",
        "if True:",
        (FOREIGN + "test_a_server_that_is_busy_is_asked_again",),
    ),
    # Process rewards that add to the score; those of pads.
    Mutant(
        "rlhf/advantages.py",
        "scores - earned.sum(-1)",
        "scores",
        ("tests/test_advantages.py::test_process_rewards_by_hand",),
    ),
    Mutant(
        "rlhf/advantages.py",
        "process_rewards.masked_fill(~response_mask, 0)",
        "process_rewards",
        ("tests/test_advantages.py::test_process_rewards_by_hand",),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.new.strip()}")
def test_rows_are_not_stale(mutant):
    assert_not_stale(mutant)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each mutant")
def test_every_mutant_is_noticed(tmp_path):
    assert_noticed(MUTANTS, tmp_path)
