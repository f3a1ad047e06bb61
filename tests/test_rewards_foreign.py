"""Rewards that other code computes, a function or a server: C37, every way in which they fail names the row."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf.errors import UserError
from rlhf.rewards import endpoint
from tests.rewards import function_file, judged, prompts_of, rewards_of


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompts_of(tmp_path_factory.mktemp("foreign") / "data", ["0", "1", "2", "3", "4", "5"])


def refusal(prompts, spec: str, responses: list[str], rows: list[int] | None = None, **flags) -> str:
    with pytest.raises(UserError) as refused:
        judged(rewards_of(prompts, spec, **flags), responses, rows)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return [1, float('nan'), 3]", "the reward score is nan for row 4 of"),
        ("return [1, 2, float('-inf')]", "the reward score is -inf for row 2 of"),
        ("return [1, 10**400, 3]", "the reward score is 1000000000000000000000000000000000000000 for row 4 of"),
        ("return [1, None, 3]", "the reward score returned None for row 4 of"),
        ("return [1, '2', 3]", "the reward score returned '2', a str, for row 4 of"),
        ("return [1, 2]", "the reward score returned 2 values for 3 responses (rows 5, 4, 2 of"),
        ("return []", "returned 0 values for 3 responses"),
        ("return 1.0", "the reward score returned '1.0', a float, for rows 5, 4, 2 of"),
        ("return None", "the reward score returned None for rows 5, 4, 2 of"),
        ("return {0: 1}", "return a list of numbers"),
    ],
)
def test_what_is_no_finite_number_for_each_response_is_named(prompts, tmp_path, body, why):
    argument = function_file(tmp_path / "mine.py", body)
    message = refusal(prompts, f"function:{argument}", ["a", "b", "c"], [5, 4, 2])
    assert why in message
    assert "prompts_train.pt" in message


def test_a_function_that_raises_is_named_with_row_and_line(prompts, tmp_path):
    """It is called once for all, then for one response after the other until one fails."""
    body = "return [1 / (float(x) - 3) for x in responses]"
    argument = function_file(tmp_path / "mine.py", body)
    message = refusal(prompts, f"function:{argument}", ["1", "2", "3", "4"], [0, 4, 5, 1])
    where = re.escape(f"{tmp_path / 'mine.py'}:4")
    assert re.search(rf"score failed on row 5 of .*prompts_train.pt \(ZeroDivisionError: .*, at {where}\)", message)


def test_a_function_that_fails_on_all_together_names_the_first_rows(prompts, tmp_path):
    argument = function_file(tmp_path / "mine.py", "assert len(responses) == 1, 'too many'; return [0]")
    message = refusal(prompts, f"function:{argument}", ["1", "2", "3", "4", "5"], [5, 4, 3, 2, 1])
    assert "failed on rows 5, 4, 3 and 2 more of" in message
    assert "AssertionError: too many" in message


def test_a_function_that_exits_does_not_end_the_process(prompts, tmp_path):
    argument = function_file(tmp_path / "mine.py", "raise SystemExit('done')")
    assert "SystemExit: done" in refusal(prompts, f"function:{argument}", ["1"])


@pytest.mark.parametrize("timeout", [60.0, 0.0])
def test_the_limit_decides_on_the_thread(prompts, tmp_path, timeout):
    """With a limit a function runs beside the main thread; without, in it, where signals work."""
    body = "return [float(threading.current_thread() is threading.main_thread())]"
    argument = function_file(tmp_path / "mine.py", body)
    assert judged(rewards_of(prompts, f"function:{argument}", reward_timeout=timeout), ["a"]).total.item() == (
        timeout == 0
    )


def test_a_late_function_is_named_at_the_limit(prompts, tmp_path):
    argument = function_file(tmp_path / "mine.py", "time.sleep(5); return [1] * len(rows)")
    began = time.monotonic()
    message = refusal(prompts, f"function:{argument}", ["a", "b"], [3, 1], reward_timeout=0.1)
    assert time.monotonic() - began < 3
    assert "score took longer than 0.1 s for rows 3, 1 of" in message
    assert "--reward_timeout" in message


def test_the_search_for_the_row_has_the_same_limit(prompts, tmp_path):
    argument = function_file(tmp_path / "mine.py", "if len(rows) == 1: time.sleep(5)\n    raise ValueError('bad')")
    began = time.monotonic()
    message = refusal(prompts, f"function:{argument}", ["a", "b"], reward_timeout=0.2)
    assert time.monotonic() - began < 3
    assert "failed on rows 0, 1 of" in message


# -------------------------------------------------------------------------------------------------------- a server


@pytest.fixture
def server(monkeypatch):
    """A server on this machine: `server.reply(body)` gives (status, bytes) of a request; `server.seen` keeps them."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.seen.append((self.path, self.headers["Content-Type"], body))
            status, answer = found.reply(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.handle_error = lambda *_: None
    found.seen = []
    found.spec = f"http:http://127.0.0.1:{found.server_port}/score"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def test_a_server_is_asked_once_for_all(prompts, server):
    server.reply = lambda body: (200, json.dumps({"rewards": [len(r) for r in body["responses"]]}).encode())
    scores = judged(rewards_of(prompts, f"0.5*{server.spec}", "numeric"), [" Yes.", "é 4"], [3, 4])
    assert scores.parts["http"].tolist() == [5, 3]
    assert scores.total.tolist() == [2.5, 2.5]
    sent = {"prompts": ["Human: question 3", "Human: question 4"], "responses": [" Yes.", "é 4"]}
    assert server.seen == [("/score", "application/json", {**sent, "references": ["3", "4"]})]


def test_the_url_itself_is_a_word_too(prompts, server):
    server.reply = lambda body: (200, b'{"rewards": [[0.25, 0.5]]}')
    scores = judged(rewards_of(prompts, server.spec.removeprefix("http:")), ["4"])
    assert scores.token[0].tolist() == [0.25, 0.5]


def test_a_server_that_is_busy_is_asked_again(prompts, server):
    server.reply = lambda body: (503, b"") if len(server.seen) < 3 else (200, b'{"rewards": [2]}')
    assert judged(rewards_of(prompts, server.spec), ["a"]).total.item() == 2
    assert len(server.seen) == 3


def test_a_server_that_hangs_up_is_asked_again(prompts, server):
    """A connection that ends without an answer is a connection error."""

    def reply(body):
        if len(server.seen) < 2:
            raise BrokenPipeError
        return 200, b'{"rewards": [2]}'

    server.reply = reply
    assert judged(rewards_of(prompts, server.spec), ["a"]).total.item() == 2
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((500, b"division by zero\nTraceback"), "failed (500 Internal Server Error: division by zero)"),
        ((404, b""), "failed (404 Not Found)"),
        ((200, b"[1, 2"), 'is not JSON; answer {"rewards": [...]}'),
        ((200, b"[1]"), 'has no "rewards"'),
        ((200, b'{"reward": [1]}'), 'has no "rewards"'),
        ((200, b'{"rewards": [1, 2]}'), "returned 2 values for 1 responses"),
        ((200, b'{"rewards": [NaN]}'), "is nan for row 4 of"),
        ((200, b'{"rewards": [null]}'), "returned None for row 4 of"),
        ((200, b'{"rewards": 3}'), "return a list of numbers"),
    ],
)
def test_a_server_that_answers_something_else_is_named_and_not_asked_again(prompts, server, answer, why):
    server.reply = lambda body: answer
    message = refusal(prompts, server.spec, ["a"], [4])
    assert why in message
    assert "row 4 of" in message
    assert len(server.seen) == 1


def test_a_late_server_is_named_at_the_limit(prompts, server):
    server.reply = lambda body: time.sleep(3) or (200, b"{}")
    began = time.monotonic()
    message = refusal(prompts, server.spec, ["a"], [4], reward_timeout=0.2)
    assert time.monotonic() - began < 2
    assert "for row 4 of" in message
    assert "took longer than 0.2 s" in message


def test_a_server_that_is_not_there_is_tried_again_and_named(prompts, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refusal(prompts, f"http:http://127.0.0.1:{port}/", ["a"], [2])
    assert "for row 2 of" in message
    assert "Connection refused" in message
    assert waits == [0.001, 0.002, 0.004]
