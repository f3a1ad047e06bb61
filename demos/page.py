"""What the pages of the demos share: their look, the sampling controls, the status line, and how they are served.

Nothing leaves the machine: no analytics, no share link, no fonts or scripts from elsewhere, no history of runs.
"""

from __future__ import annotations

import contextlib
import html
import math
import os
import random
import socket
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from serving import Reply, ServingFlags, describe

from rlhf.errors import UserError
from rlhf.rollouts import Sampling

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import fastapi
    import gradio as gr
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError:
    gr = None

LOOPBACK = ("127.0.0.1", "localhost")

CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
.status { min-height: 1.5em; }
.status p { font-size: var(--text-sm); color: var(--block-info-text-color) !important; }
.status p.error { color: var(--error-text-color) !important; }
.status p, .heading p { margin: 0; overflow-wrap: anywhere; }
.heading h1 { font-size: var(--text-xl); font-weight: 600; margin: 0; }
footer { display: none !important; }
"""


def check_gradio() -> None:
    """Raise `UserError` where gradio is not installed."""
    if gr is None:
        raise UserError("the demos need gradio, which is not installed; run: pip install -e .[demo]")


def heading(title: str, text: str) -> Any:
    """The top of a page."""
    return gr.HTML(f"<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>", elem_classes="heading")


def status_line() -> Any:
    """Where the page says, in one sentence, what it is doing or what went wrong."""
    return gr.HTML(elem_classes="status", elem_id="status")


def status(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def failure(error: Exception) -> str:
    """What went wrong, as the status line's one sentence; other than the user's mistakes, traced on the terminal."""
    sentence = str(error)
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {sentence.splitlines()[0] if sentence else 'no more is known'}"
    return f'<p class="error" role="alert">{html.escape(sentence[:1].upper() + sentence[1:])}</p>'


def account(label: str, answer: Reply, seconds: float, sampling: Sampling, format: Mapping[str, Any]) -> str:
    """What the status line says of a complete answer."""
    tokens = f"{answer.num_tokens} token{'' if answer.num_tokens == 1 else 's'} in {seconds:.1f} s"
    choice = f"seed {sampling.seed}" if sampling.do_sample else "likeliest tokens"
    emptiness = "" if answer.text else "; the answer is empty"
    return f"{label}: {tokens}, {answer.ended}{emptiness}; {choice}; format: {describe(format)}"


class Running:
    """The answers that are being computed, at most one in each open page, and how to end them."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}

    def start(self, session: str) -> threading.Event:
        """The event that ends the answer that a page now begins."""
        self._stops[session] = threading.Event()
        return self._stops[session]

    def stop(self, request: gr.Request) -> None:
        """The page's stop button."""
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    def forget(self, request: gr.Request) -> None:
        """The page was closed."""
        self.stop(request)
        self._stops.pop(request.session_hash, None)


def sampling_controls(flags: ServingFlags, *, longest: int) -> list[Any]:
    """The controls whose values `sampling_of` takes, starting at the values of the flags."""
    return [
        gr.Slider(
            0,
            max(2.0, flags.temperature),
            value=flags.temperature if flags.do_sample else 0,
            step=0.05,
            label="Temperature",
            info="0 always takes the likeliest token",
        ),
        gr.Slider(0.05, 1, value=flags.top_p, step=0.01, label="Top-p", info="1 keeps all tokens"),
        gr.Slider(0, max(200, flags.top_k), value=flags.top_k, step=1, label="Top-k", info="0 keeps all tokens"),
        gr.Slider(
            1,
            max(longest, flags.max_new_tokens),
            value=flags.max_new_tokens,
            step=1,
            label="Length",
            info="Most tokens of an answer",
        ),
        gr.Number(value=-1, precision=0, label="Seed", info="-1 draws a new one each time"),
    ]


def sampling_of(temperature: float, top_p: float, top_k: float, max_new_tokens: float, seed: float | None) -> Sampling:
    """The sampling that the controls ask for; a negative or empty seed draws one.

    Raises:
        UserError: a seed that torch doesn't take.
    """
    seed = random.randrange(2**31) if seed is None or math.isnan(seed) or seed < 0 else int(seed)
    if seed >= 2**63:
        raise UserError(f"the seed {seed} is too large; give one below 2^63")
    return Sampling(
        max_new_tokens=int(max_new_tokens),
        temperature=float(temperature or 1.0),
        top_k=int(top_k),
        top_p=float(top_p),
        do_sample=temperature > 0,
        seed=seed,
    )


def serve(page: Any, flags: ServingFlags, name: str) -> None:
    """Serve a page until it is interrupted.

    Raises:
        UserError: the address can't be had.
    """
    server, listener = server_of(page, flags)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    with listener, contextlib.suppress(KeyboardInterrupt):
        print(f"{name}: open http://{host}:{flags.port}", flush=True)
        server.run(sockets=[listener])


def server_of(page: Any, flags: ServingFlags) -> tuple[uvicorn.Server, socket.socket]:
    """A web server for a page, and the socket that it is to listen on, already bound.

    Gradio's own `launch` is not used: it asks for a public link where its first request to itself takes long.

    Raises:
        UserError: the address can't be had.
    """
    try:
        family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        listener = socket.create_server((flags.host, flags.port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a machine"
        raise UserError(
            f"--host={flags.host} --port={flags.port} can't be listened on ({reason}); give another --port or --host"
        ) from None
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if flags.host in LOOPBACK:
        # A page from elsewhere may not reach this one under a name of its own that points here.
        outer.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    app = gr.mount_gradio_app(outer, page, path="/", **mount_options(flags))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    return uvicorn.Server(config), listener


def mount_options(flags: ServingFlags) -> dict[str, Any]:
    """Gradio's settings: nothing shared, recorded or fetched from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {
        "server_name": flags.host,
        "server_port": flags.port,
        "footer_links": [],
        "run_history": False,
        "show_error": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "theme": theme.set(block_info_text_color="*neutral_500", input_placeholder_color="*neutral_500"),
        "css": CSS,
    }
