"""PPO on every kind of reward, in process; and what a reward that fails does to a run, on one process and on two."""

from __future__ import annotations

import dataclasses
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from rlhf import rlhf_ppo
from rlhf.errors import UserError
from rlhf.flags import launch
from rlhf.rlhf_ppo import PPOFlags
from tests.ppo import World, flags_of, make_world, on_two_processes, set_up, train
from tests.rewards import function_file
from tests.splits import tokenizer_for
from tests.test_ppo_roles import other_rm  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_RM = {"rm_experiment_dir": None, "critic_init": "zero"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def text_of(experience) -> str:
    return tokenizer_for().decode(experience.response, skip_special_tokens=True)


def test_a_mix_of_models_functions_and_rules(world, tmp_path, monkeypatch):
    """C37: the score of each response is the weighted sum of what each reward alone says, the metrics are the means of
    these, and evaluations log them too; the critic starts as half the reward model that counts half."""
    argument = function_file(tmp_path / "mine.py", "return [len(r) / 10 for r in responses]", "characters")
    mix = [f"0.5*model:{world.rm}", f"function:{argument}", "-2*length:5"]
    flags = flags_of(world, tmp_path / "run", rm_experiment_dir=None, reward=mix, max_steps=2, eval_interval=1)
    watched = train(flags, monkeypatch)
    model = set_up(flags_of(world, tmp_path / "other")).rewards.parts[0]
    assert model.name == "model"
    for line, experiences in zip(watched.train_lines(), watched.experiences, strict=True):
        for e in experiences:
            expected = {"characters": len(text_of(e)) / 10, "length": -abs(len(e.response) - 5) / 5}
            assert {name: e.parts[name] for name in expected} == pytest.approx(expected, rel=1e-6)
            assert list(e.parts) == ["model", "characters", "length"]
            total = 0.5 * e.parts["model"] + e.parts["characters"] - 2 * e.parts["length"]
            assert e.score == pytest.approx(total, rel=1e-5)
            assert e.process_rewards is None
        for name in experiences[0].parts:
            mean = np.mean([e.parts[name] for e in experiences])
            assert line[f"train/reward_{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    (first, *_) = watched.val_lines()
    total = 0.5 * first["val/reward_model"] + first["val/reward_characters"] - 2 * first["val/reward_length"]
    assert first["val/score"] == pytest.approx(total, rel=1e-5)
    start = watched.experiences[0]
    scores = torch.tensor([0.5 * e.parts["model"] for e in start])
    torch.testing.assert_close(torch.stack([e.values[-1] for e in start]), scores, atol=1e-5, rtol=1e-4)


def test_the_model_of_its_own_flag_is_that_of_the_list(world, tmp_path, monkeypatch):
    """--rm_experiment_dir=X and --reward model:X train to the same weights."""
    one = train(flags_of(world, tmp_path / "one"), monkeypatch)
    other = train(
        flags_of(world, tmp_path / "other", rm_experiment_dir=None, reward=[f"model:{world.rm}"]), monkeypatch
    )
    assert all(torch.equal(value, other.weights()[name]) for name, value in one.weights().items())


def test_a_reward_model_with_another_tokenizer(world, other_rm, tmp_path, monkeypatch):  # noqa: F811
    """C7: fine as a reward; the critic starts elsewhere."""
    folder, _ = other_rm
    watched = train(flags_of(world, tmp_path / "run", rm_experiment_dir=folder, critic_init="sft"), monkeypatch)
    assert watched.train_lines()[0]["train/score_std"] > 0
    assert watched.train_lines()[0]["train/reward_model"] == pytest.approx(watched.train_lines()[0]["train/score"])


def test_a_reward_over_http(world, tmp_path, monkeypatch):
    """The server gets the texts of the rollout in one request a step, and its numbers are the scores."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"rewards": [len(r) for r in body["responses"]]}).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        url = f"http:http://127.0.0.1:{server.server_port}/"
        watched = train(flags_of(world, tmp_path / "run", **WITHOUT_RM, reward=[url], max_steps=2), monkeypatch)
        server.shutdown()
    assert [len(body["prompts"]) for body in asked[:2]] == [4, 4]  # what follows is the evaluation at the end
    for body, experiences in zip(asked[:2], watched.experiences, strict=True):
        assert body["responses"] == [text_of(e) for e in experiences]
        assert [e.score for e in experiences] == [len(text) for text in body["responses"]]
        assert all(text.startswith(" Yes, ") for text in body["references"])


def test_process_rewards_reach_the_tokens(world, tmp_path, monkeypatch):
    """Every token earns 1: scores are the lengths, and with beta = 0 and gamma = lambda = 1 the return of token t of T
    is T - t, with nothing left at the end; given as one score at the end instead, it is T everywhere. Normalised, all
    of it is divided by the deviation of the lengths, and still nothing is left.
    """
    body = "return [[1.0] * len(r['response_ids']) for r in rows]"
    spread, whole = (
        function_file(tmp_path / "spread.py", body),
        function_file(tmp_path / "whole.py", "return [len(r['response_ids']) for r in rows]"),
    )
    found, targets_of = {}, rlhf_ppo.targets_of

    def watch(*args, **options):
        found[name] = targets_of(*args, **options)
        return found[name]

    monkeypatch.setattr(rlhf_ppo, "targets_of", watch)
    settings = {**WITHOUT_RM, "init_kl_coeff": 0.0, "gae_lambd": 1.0, "missing_eos": "keep"}
    for name, argument in (("spread", spread), ("whole", whole), ("normal", spread)):
        changes = {"reward": [f"function:{argument}"], "normalize_rewards": name == "normal"}
        flags = flags_of(world, tmp_path / name, **settings, **changes)
        watched = train(flags, monkeypatch)
        assert watched.train_lines()[0]["train/score"] == watched.train_lines()[0]["train/response_length"]
    deviation = np.std([len(e.response) for e in watched.experiences[0]], ddof=1)
    for i, e in enumerate(watched.experiences[0]):
        n = len(e.response)
        expected = [(n - t) / deviation if t < n else 0 for t in range(8)]
        assert found["normal"].returns[i].tolist() == pytest.approx(expected, abs=1e-5)
        assert found["spread"].returns[i].tolist() == [n - t if t < n else 0 for t in range(8)]
        assert found["whole"].returns[i, : n + 1].tolist() == [n] * min(8, n + 1)


def test_a_critic_needs_a_reward_model_to_start_as_one(world, tmp_path):
    with pytest.raises(UserError, match=r"--critic_init=reward .* set --critic_init=sft or zero"):
        rlhf_ppo.main(flags_of(world, tmp_path / "run", rm_experiment_dir=None, reward=["length:5"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return [1 / (r['row'] - 2) for r in rows]", "score failed on row 2 of"),
        ("return [float('nan') if r['row'] == 3 else 0 for r in rows]", "score is nan for row 3 of"),
        ("return [0]", "returned 1 values for 4 responses"),
        ("time.sleep(9)", "score took longer than 0.2 s for rows 0, 1, 2 and 1 more of"),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_status_2(world, tmp_path, monkeypatch, capsys, body, why):
    """C37: one sentence that names the row; nothing is trained, no model is written."""
    argument = function_file(tmp_path / "mine.py", body)
    flags = flags_of(
        world, tmp_path / "run", **WITHOUT_RM, reward=[f"function:{argument}"], reward_timeout=0.2, shuffle=False
    )
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(dataclasses.asdict(flags)))
    monkeypatch.setattr("sys.argv", ["rlhf_ppo.py", f"--args_file={path}"])
    with pytest.raises(SystemExit) as stopped:
        launch(rlhf_ppo.main, PPOFlags)
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert why in sentence
    assert "prompts_train.pt" in sentence
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_processes_end_together_where_the_reward_of_one_fails(world, tmp_path):
    """C17, C37: row 3 is the second process's; both end with status 2 and name it, and neither waits for the other."""
    argument = function_file(tmp_path / "mine.py", "return [1 / (r['row'] - 3) for r in rows]")
    flags = flags_of(
        world, tmp_path / "run", **WITHOUT_RM, reward=[f"function:{argument}"], shuffle=False, devices="2",
        strategy="ddp", rollout_size=2, mini_batch_size=2, args_file=None,
    )  # fmt: skip
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(dataclasses.asdict(flags)))
    printed = on_two_processes(ROOT / "rlhf" / "rlhf_ppo.py", f"--args_file={path}", status=2)
    assert all("score failed on row 3 of" in text for text in printed)
