"""Rewards: the rules by hand, the mix and its words, and rewards that are spread over a response."""

from __future__ import annotations

import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.data.text import encode_pair
from rlhf.errors import UserError
from rlhf.flags import parse
from rlhf.rewards import rules
from rlhf.rewards.answers import token_at
from rlhf.rewards.specs import KINDS, Spec, parse_spec, specs_of
from rlhf.rlhf_ppo import PPOFlags
from tests.rewards import Flags, function_file, judged, prompts_of, response_ids, rewards_of
from tests.splits import tokenizer_for
from tests.tiny import make_model
from tests.tiny_tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompts_of(tmp_path_factory.mktemp("rewards") / "data", ["7", "#### 1,250", " -2.5", "New York"])


# -------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 - 5 = 7", "7"),
        ("10-3", "3"),
        ("(-3)", "-3"),
        ("it is -3.", "-3"),
        ("x−4 or −4", "-4"),
        ("1,234,567.5 in all", "1234567.5"),
        ("3,5", "5"),
        ("1,2345", "2345"),
        ("5)-2", "2"),
        ("about .5", "0.5"),
        ("v1.2.", "1.2"),
        ("2e3", "2000"),
        ("$5, 40%", "40"),
        ("**+8**", "8"),
        ("nothing", None),
        ("", None),
    ],
)
def test_last_number_by_hand(text, number):
    assert rules.last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "reference", "tolerance", "reward"),
    [
        ("so it is 72", "48 / 2 = 24, 48 + 24 = 72\n#### 72", "0", 1),
        ("72.0", "72", "0", 1),
        ("72 and not 73", "72", "0", 0),
        ("-72", "72", "0", 0),
        ("0.30000000000000004", "0.3", "0", 0),
        ("0.305", "0.3", "0.005", 1),
        ("0.3051", "0.3", "0.005", 0),
        ("12345678901234567890123456789012", "12345678901234567890123456789013", "0", 0),
        ("seventy-two", "72", "0", 0),
    ],
)
def test_numeric_by_hand(response, reference, tolerance, reward):
    """The last number counts, exactly: 32 digits that differ in the last are not equal, whatever a float says."""
    assert rules.numeric_answer(response, reference, Decimal(tolerance)) == reward


def test_exact_by_hand():
    assert rules.exact_answer("\n New  York\n", "New York") == 1
    assert rules.exact_answer("new york", "New York") == 0
    assert rules.exact_answer("New York!", "New York") == 0


def test_lengths_by_hand():
    """Target 40: 30 tokens are a quarter off, either way; 120 are twice the target too many. Over-long from 40 to 50:
    43 tokens are three tenths of the way."""
    assert [rules.length_target(n, 40) for n in (30, 40, 50, 120)] == [-0.25, 0, -0.25, -2]
    assert [rules.overlong(n, 40, 50) for n in (0, 40, 43, 50, 51)] == [0, 0, pytest.approx(-0.3), -1, -1]


def test_repetition_by_hand():
    """ "a b a b a b": five pairs of words, two of them distinct: 3/5 are repeats. Four triples, two distinct: 1/2."""
    assert rules.repetition("a b A b a B", 2) == pytest.approx(-3 / 5)
    assert rules.repetition("a b a b a b", 3) == pytest.approx(-1 / 2)
    assert rules.repetition("a b c d", 1) == 0
    assert rules.repetition("word " * 10, 1) == pytest.approx(-0.9)
    assert rules.repetition("a b", 3) == 0
    assert rules.repetition("", 1) == 0


def test_keywords_are_whole_words():
    assert rules.keywords("Yes: garden, GARDENS", ["yes", "garden", "gard", "dens"]) == pytest.approx(0.5)
    assert rules.keywords("c++ and c", ["c++"]) == 1
    assert rules.keywords("", ["yes"]) == 0


def test_rules_from_their_words(prompts):
    """Every rule through `--reward`; a pattern may hold colons and stars, and its dot matches a line feed."""
    rewards = rewards_of(
        prompts, "exact", "numeric", "numeric:0.5", "regex:<a>.*:.*</a>$", "length:4", "overlong:2:10", "repetition",
        "repetition:1", "keyword:the, answer",
    )  # fmt: skip
    responses = ["7", " the <a>\n1250:1</a>", "-2.25", "New York"]
    lengths = [len(response_ids(text)) for text in responses]
    parts = judged(
        rewards_of(prompts, "exact", "regex:<a>.*:.*</a>$", "length:4", "overlong:2:10", "keyword:the, answer"),
        responses,
    ).parts
    assert parts["exact"].tolist() == [1, 0, 0, 1]
    assert parts["regex"].tolist() == [0, 1, 0, 0]
    assert parts["keyword"].tolist() == [0, 0.5, 0, 0]
    assert parts["length"].tolist() == [-abs(n - 4) / 4 for n in lengths]
    assert parts["overlong"].tolist() == pytest.approx([-min(1, max(0, n - 2) / 8) for n in lengths])
    parts = judged(rewards, ["7", "1250.5", "-2"], [0, 1, 2]).parts
    assert list(parts) == [
        "exact", "numeric", "numeric_2", "regex", "length", "overlong", "repetition", "repetition_2", "keyword"
    ]  # fmt: skip
    assert parts["numeric"].tolist() == [1, 0, 0]
    assert parts["numeric_2"].tolist() == [1, 1, 1]
    repeated = judged(rewards_of(prompts, "repetition", "repetition:1"), ["a b a b a b"], [0]).parts
    assert [x.item() for x in repeated.values()] == pytest.approx([-1 / 2, -2 / 3])


@pytest.mark.parametrize(("spec", "row"), [("exact", 1), ("numeric", 1), ("numeric", 2)])
def test_a_row_that_no_rule_can_check_is_named(tmp_path, spec, row):
    """C37: an empty reference, and for numbers one without any, is a fault of the data, not a wrong answer."""
    found = prompts_of(tmp_path, ["1", "" if row == 1 else "2", "two"])
    with pytest.raises(UserError, match=rf"--reward {spec}: row {row} of .*prompts_train.pt can't be checked"):
        judged(rewards_of(found, spec), ["1", "2", "3"])


# -------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "weight", "kind", "argument"),
    [
        ("numeric", 1, "numeric", ""),
        ("0.5*length:200", 0.5, "length", "200"),
        (" -1*keyword:sorry", -1, "keyword", "sorry"),
        ("2 * regex:a*b:c*", 2, "regex", "a*b:c*"),
        ("1e-2*model:a/b", 0.01, "model", "a/b"),
        (".5*http:http://127.0.0.1:8000/x", 0.5, "http", "http://127.0.0.1:8000/x"),
        ("https://host/x", 1, "https", "//host/x"),
        ("regex:3*x", 1, "regex", "3*x"),
        ("function:f.py:g", 1, "function", "f.py:g"),
    ],
)
def test_words_are_read(text, weight, kind, argument):
    assert parse_spec(text) == Spec(weight, kind, argument, text.strip())


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nummeric", "'nummeric' is no kind of reward"),
        ("numeric*2", "no kind of reward"),
        ("0*numeric", "a weight of 0 gives no reward"),
        ("length", "write length:200"),
        ("length:0", "'0' is no number of 1 or more"),
        ("length:many", "'many' is no number"),
        ("repetition:0", "no number of 1 or more"),
        ("numeric:-1", "'-1' is no number of 0 or more"),
        ("numeric:x", "write numeric:0.01"),
        ("overlong:200", "write overlong:FROM:TO"),
        ("overlong:200:100", "no range"),
        ("exact:yes", "exact takes no argument"),
        ("regex", "it has no pattern"),
        ("regex:(", "no regular expression"),
        ("keyword: ,", "names no word"),
        ("http:host", "no URL"),
        ("function:score", "does not say which function"),
        ("function:nowhere.py:score", "there is no file nowhere.py"),
        ("function:no_such_module:score", "can't be imported .ModuleNotFoundError"),
        ("function:math:score", "has no function 'score'"),
        ("function:math:pi", "has no function 'pi'"),
        ("model:./nowhere", "--reward=./nowhere: there is no such folder"),
        ("model", "no model is given; set --reward"),
    ],
)
def test_words_that_make_no_sense_are_named(prompts, spec, why):
    with pytest.raises(UserError, match=why):
        rewards_of(prompts, spec)


def test_a_file_that_breaks_on_import_is_named(prompts, tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit('stop')\n")
    with pytest.raises(UserError, match=r"mine.py can't be imported \(SystemExit: stop\)"):
        rewards_of(prompts, f"function:{tmp_path / 'mine.py'}:score")


def test_no_reward_at_all_is_an_error_that_lists_them():
    with pytest.raises(UserError, match="no reward is given") as told:
        specs_of(Flags())
    assert all(kind in str(told.value) for kind in KINDS)


def test_the_command_line_and_the_models_own_flag():
    """The model of --rm_experiment_dir comes first, with weight 1."""
    argv = ["--data_dir=d", "--reward", "0.5*length:9", " -1*exact", "--rm_experiment_dir=rm", "--reward_timeout=3"]
    flags = parse(PPOFlags, argv)
    assert (flags.reward, flags.reward_timeout) == (["0.5*length:9", " -1*exact"], 3.0)
    found = [(spec.weight, spec.kind, spec.argument, spec.flag) for spec in specs_of(flags)]
    assert found == [
        (1.0, "model", "rm", "rm_experiment_dir"), (0.5, "length", "9", "reward"), (-1.0, "exact", "", "reward")
    ]  # fmt: skip
    assert parse(PPOFlags, ["--data_dir=d", "--reward=-1*exact"]).reward == ["-1*exact"]
    assert parse(PPOFlags, ["--data_dir=d"]).reward == []


# ---------------------------------------------------------------------------------------------------------- mix


def test_mix_by_hand(prompts, tmp_path):
    """2 * numeric - 0.25 * (characters) + 0.5 * exact: "7" gives 2 - 0.25 + 0.5; "71" gives -0.5."""
    argument = function_file(tmp_path / "mine.py", "return [len(r) for r in responses]", "characters")
    scores = judged(rewards_of(prompts, "2*numeric", f"-0.25*function:{argument}", "0.5*exact"), ["7", "71"], [0, 0])
    assert scores.total.tolist() == [2.25, -0.5]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "numeric": [1, 0], "characters": [1, 2], "exact": [1, 0]
    }  # fmt: skip
    assert scores.token is None
    assert scores.total.dtype == torch.float32


def test_a_function_sees_texts_and_the_rows_of_the_data(prompts, tmp_path):
    """Texts come without control tokens; rows with the reference, their number and the response's ids; what one reward
    does to its rows reaches no other."""
    body = (
        "assert prompts == ['Human: question 2', 'Human: question 0'], prompts\n"
        "    assert responses == [' Yes.', ''], responses\n"
        "    assert [r['reference'] for r in rows] == [' -2.5', '7']\n"
        "    assert [r['row'] for r in rows] == [2, 0]\n"
        "    found = [len(r['response_ids']) - r['prompt_len'] + len(r['input_ids']) for r in rows]\n"
        "    [r.clear() for r in rows]\n"
        "    return found"
    )
    argument = function_file(tmp_path / "mine.py", body)
    scores = judged(rewards_of(prompts, f"function:{argument}", f"function:{argument}"), [" Yes.", ""], [2, 0])
    lengths = [len(response_ids(" Yes.")), 1]
    assert [part.tolist() for part in scores.parts.values()] == [lengths, lengths]
    assert list(scores.parts) == ["score", "score_2"]


def test_answers_of_other_stages_are_references(tmp_path):
    """Where the prompts come from finetune rows, the reference is the text of their response."""
    from rlhf.data.prompts import load_prompts
    from rlhf.data.splits import write_split

    prompt, answer = encode_pair(tokenizer_for(), "Human: 3 + 4?", " It is 7.")
    ids = torch.tensor(prompt + answer)
    write_split(tmp_path, "finetune", "train", [{"prompt_len": len(prompt), "input_ids": ids, "targets": ids}])
    found = load_prompts(str(tmp_path), "train", tokenizer_for())
    assert found.row(0)["reference"] == " It is 7."
    assert judged(rewards_of(found, "numeric", "exact"), ["7"]).total.tolist() == [1]


def test_another_split_has_its_own_references(prompts, tmp_path):
    other = prompts_of(tmp_path, ["8"])
    rewards = rewards_of(prompts, "numeric")
    assert judged(rewards, ["7"]).total.item() == 1
    assert judged(rewards.over(other), ["7"]).total.item() == 0
    assert judged(rewards.over(other), ["8"]).total.item() == 1


def test_no_responses_are_no_failure(prompts, tmp_path):
    """A device without responses: nothing is called, and every part is there, empty."""
    argument = function_file(tmp_path / "mine.py", "raise ValueError")
    scores = judged(rewards_of(prompts, "numeric", f"function:{argument}"), [])
    assert scores.total.shape == (0,)
    assert {name: part.shape for name, part in scores.parts.items()} == {"numeric": (0,), "score": (0,)}


def test_devices_fail_together(prompts):
    """C17, C37: what another device reports ends this one, whose own responses are fine."""
    rewards = rewards_of(prompts, "numeric")
    seen = []
    rewards.gather = lambda items: seen.append(items) or [*items, UserError("the reward of another device failed")]
    with pytest.raises(UserError, match="the reward of another device failed"):
        judged(rewards, ["7"])
    assert seen == [[None]]
    with pytest.raises(UserError, match="row 3 of"):
        judged(rewards, ["7", "7"], [0, 3])
    assert "row 3 of" in str(seen[1][0])


# ------------------------------------------------------------------------------------------------- reward models


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_reward_models_with_other_tokenizers(prompts, tmp_path, batch_size):
    """C7: two reward models, of the policy's tokenizer and of another, weighted: each scores the text in its own
    tokens, one EOS at its end where the response has ended, none where it was cut, to 1e-5, alone or in a batch."""
    from rlhf.rewards.mix import load_rewards

    tokenizers = [tokenizer_for(), make_tokenizer(bos=True, pad_is_eos=False, vocab_size=300)]
    for i, tokenizer in enumerate(tokenizers):
        model = make_model("phi", scorer=True, seed=i, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        model.config.reward_mean, model.config.reward_scale = 0.3, 1.7
        model.save_pretrained(tmp_path / str(i))
        tokenizer.save_pretrained(tmp_path / str(i))
    flags = Flags(reward=[f"-3*model:{tmp_path / '1'}"], rm_experiment_dir=str(tmp_path / "0"))
    rewards = load_rewards(flags, prompts, tokenizer_for(), batch_size=batch_size)
    texts = [(" Because of the rain.", True), (" Wait for", False), ("", True)]
    responses = [response_ids(text)[: None if ended else -1] for text, ended in texts]
    scores = rewards([prompts.prompt(i) for i in range(3)], responses, range(3))
    expected = torch.zeros(2, 3)
    for i, tokenizer in enumerate(tokenizers):
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(i))
        for k, (text, ended) in enumerate(texts):
            prompt, response = encode_pair(tokenizer, f"Human: question {k}", text, ended=ended)
            with torch.no_grad():
                expected[i, k] = (plain(torch.tensor([prompt + response])).logits.item() - 0.3) / 1.7
    torch.testing.assert_close(torch.stack([*scores.parts.values()]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.total, expected[0] - 3 * expected[1], atol=1e-5, rtol=1e-5)
    assert list(scores.parts) == ["model", "model_2"]


# ------------------------------------------------------------------------------------------- spread over a response


def test_rewards_of_tokens_by_hand(prompts, tmp_path):
    """Token t earns t for the second response alone: 0 + 1 + … + (T - 1); twice that, plus 1 for the right number."""
    argument = function_file(
        tmp_path / "mine.py", "return [5] + [list(range(len(r['response_ids']))) for r in rows[1:]]", "steps"
    )
    scores = judged(rewards_of(prompts, f"2*function:{argument}", "numeric"), ["7", "one two 1250"])
    length = len(response_ids("one two 1250"))
    assert scores.token[0].tolist() == [0.0] * len(response_ids("7"))
    assert scores.token[1].tolist() == [2.0 * t for t in range(length)]
    assert scores.total.tolist() == [11, length * (length - 1) + 1]
    assert scores.parts["steps"].tolist() == [5, length * (length - 1) / 2]


def test_rewards_of_ranges_stand_at_the_token_that_ends_them(prompts, tmp_path):
    """Two sentences and a range over both: each score stands where the text up to its end is first complete; nothing
    else earns anything, and two scores at one token add up."""
    text = "First we add. Then 冷 we stop."
    argument = function_file(
        tmp_path / "mine.py", "return [[(0, 13, 1.0), (13, len(r), -0.5), (0, len(r), 2)] for r in responses]"
    )
    scores = judged(rewards_of(prompts, f"0.5*function:{argument}"), [text], [0])
    ids, tokenizer = response_ids(text), tokenizer_for()
    (first, last) = scores.token[0].nonzero().flatten().tolist()
    assert tokenizer.decode(ids[: first + 1]).startswith(text[:13])
    assert not tokenizer.decode(ids[:first]).startswith(text[:13])
    assert last == len(ids) - 2  # the EOS after it spells nothing
    assert scores.token[0][[first, last]].tolist() == [0.5, 0.75]
    assert scores.total.tolist() == [1.25]


def test_a_character_of_several_tokens_ends_with_the_last_of_them():
    """ "冷" is three bytes, each a token of its own here: the range up to it ends with the third."""
    tokenizer, text = tokenizer_for(), "a冷b"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 5
    assert [token_at(tokenizer, ids, text, end) for end in (1, 2, 3)] == [0, 3, 4]


def test_rewards_may_be_arrays(prompts, tmp_path):
    body = (
        "import numpy, torch\n"
        "    return [numpy.float32(1.5), torch.tensor([1.0, 0.0] + [0.0] * (len(rows[1]['response_ids']) - 2)), True]"
    )
    scores = judged(rewards_of(prompts, f"function:{function_file(tmp_path / 'mine.py', body)}"), ["7", "a b c", "x"])
    assert scores.total.tolist() == [1.5, 1.0, 1.0]
    whole = function_file(tmp_path / "other.py", "import numpy\n    return numpy.arange(len(responses))")
    assert judged(rewards_of(prompts, f"function:{whole}"), ["7", "8"]).total.tolist() == [0, 1]
    assert np.isclose(scores.token[1].sum(), 1)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("[1.0, 2.0]", "returned 2 values for the 3 tokens of the response to row 1 of"),
        ("[(0, 99, 1.0)]", "returned (0, 99, 1.0) for a response of 3 characters to row 1 of"),
        ("[(2, 2, 1.0)]", "with 0 <= start < end <= its length"),
        ("[(0, 1.5, 1.0)]", "with 0 <= start < end <= its length"),
        ("[(0, 1)]", "with 0 <= start < end <= its length"),
        ("[(0, 1, 1.0), 3]", "returned 3 for a response"),
        ("[(0, 1, float('nan'))]", "is nan for row 1 of"),
        ("[0.0, float('inf'), 0.0]", "is inf for row 1 of"),
    ],
)
def test_spread_rewards_that_do_not_fit_are_named(prompts, tmp_path, value, why):
    """C37: "a c" and its EOS are three tokens."""
    assert len(response_ids("a c")) == 3
    argument = function_file(tmp_path / "mine.py", f"return [0, {value}]")
    with pytest.raises(UserError, match=re.escape(why)):
        judged(rewards_of(prompts, f"function:{argument}"), ["7", "a c"])
