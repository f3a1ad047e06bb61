"""A reward that another process computes, over HTTP."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from rlhf.errors import UserError
from rlhf.rewards.answers import Answers
from rlhf.rewards.functions import TimeLimitError, first_line, within

ATTEMPTS = 4
"""Times that a request is sent before a connection counts as failed."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt; the wait doubles each time."""
BUSY = (502, 503, 504)
"""Statuses of a server that is not there yet, and may be in a moment."""


class EndpointReward:
    """POST {"prompts": [...], "responses": [...], "references": [...]}, all texts; the answer is {"rewards": [...]}.

    Args:
        url: http or https.
        timeout: seconds of one call with all its attempts; 0: no limit.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def __call__(self, answers: Answers) -> Any:
        """The list under `rewards`.

        Raises:
            UserError: no connection after `ATTEMPTS`, another status than 200, an answer of another form, or none in
                time; it names the rows.
        """
        body = json.dumps(
            {
                "prompts": answers.prompts,
                "responses": answers.responses,
                "references": [row["reference"] for row in answers.rows],
            }
        ).encode()
        asked = f"the reward of {self.url} for {answers.places()}"
        try:
            answer = json.loads(within(self.timeout, lambda: self._post(body)))
        except (TimeLimitError, TimeoutError):
            raise UserError(
                f"{asked} took longer than {self.timeout:g} s; look at the server, or raise --reward_timeout"
            ) from None
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace").strip().splitlines()
            more = f": {said[0]}" if said else ""
            raise UserError(f"{asked} failed ({error.code} {error.reason}{more}); look at the server's log") from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{asked} failed ({first_line(error)}); start the server, or give the URL where it listens"
            ) from error
        except ValueError:
            raise UserError(f'{asked} is not JSON; answer {{"rewards": [...]}}') from None
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise UserError(f'{asked} has no "rewards"; answer {{"rewards": [...]}}')
        return answer["rewards"]

    def _post(self, body: bytes) -> bytes:
        wait = FIRST_WAIT
        for _ in range(ATTEMPTS - 1):
            try:
                return self._post_once(body)
            except urllib.error.HTTPError as error:
                if error.code not in BUSY:
                    raise
            except (ConnectionError, urllib.error.URLError):
                pass
            time.sleep(wait)
            wait *= 2
        return self._post_once(body)

    def _post_once(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout or None) as reply:
            return reply.read()
