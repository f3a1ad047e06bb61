"""Models kept in memory, and their answers as a stream that can be stopped. Nothing here knows of the page."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import Checkpoint
from simple_parsing.helpers import field
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from rlhf.data.formats import format_of
from rlhf.data.text import encode_prompt, special_strings
from rlhf.errors import UserError
from rlhf.evaluation import stop_ids
from rlhf.experiment.devices import fast_bf16
from rlhf.flag_values import NOT_BELOW_0, RANGES
from rlhf.flags import GenerationFlags, ModelFlags
from rlhf.models.loading import check_kind, load_policy, resolve, tokenizer_of
from rlhf.rollouts import Sampling

END_OF_TURN, LENGTH, CONTEXT, STOPPED = "end of turn", "length limit", "context full", "stopped"


_RANGES = {**RANGES, "temperature": NOT_BELOW_0}
"""A temperature of 0 is the likeliest token, as on the page."""


@dataclass(kw_only=True)
class ServingFlags(GenerationFlags):
    """Models and server."""

    ranges = _RANGES

    experiment_dir: list[str] = field(action="extend", nargs="+")  # noqa: RUF009
    """Experiments, model folders or hub ids to choose among on the page; several, to compare them."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; any other lets others in, unasked."""
    port: int = 7860
    """Port to listen on."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: the fastest there is."""
    precision: Literal["auto", "32-true", "bf16-true"] = "auto"
    """Precision of the weights. auto: bf16-true on CUDA 8.0 and later, else 32-true (one row at a time, a CPU is no
    faster in bf16)."""
    keep_loaded: int = 2
    """Models kept in memory at once; the one used longest ago makes room."""
    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint."""


def check_models(flags: ServingFlags) -> None:
    """Refuse a model that no page could talk to, by its configuration and tokenizer alone.

    Raises:
        UserError: one of `--experiment_dir` is not there, no causal language model, or has no tokenizer.
    """
    for source in flags.experiment_dir:
        settings = ModelFlags(trust_remote_code=flags.trust_remote_code)
        folder = resolve(source, "experiment_dir")
        check_kind(folder, settings)
        tokenizer_of(folder, settings)


def default_format(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How to talk to a model of unknown data: through its chat template, else in Human/Assistant turns."""
    return format_of("chat_template" if tokenizer.chat_template else "dialogue", tokenizer)


@dataclass
class LoadedModel:
    """A model ready to answer.

    Attributes:
        end_ids: token ids that end an answer.
        context: most tokens that the model reads; None where it has no limit of its own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    context: int | None


class Models:
    """The models used last, at most `--keep_loaded` of them."""

    def __init__(self, flags: ServingFlags) -> None:
        self._flags = ModelFlags(trust_remote_code=flags.trust_remote_code)
        self._keep = flags.keep_loaded
        self.device, self.dtype = _device_and_dtype(flags)
        self._loaded: OrderedDict[tuple[str, int], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether `get` would return at once."""
        return _key(checkpoint) in self._loaded

    def get(self, checkpoint: Checkpoint) -> LoadedModel:
        """The model of a checkpoint, loaded where it is not there yet or its folder was written anew.

        Raises:
            UserError: it can't be loaded.
        """
        with self._lock:
            key = _key(checkpoint)
            if key not in self._loaded:
                while len(self._loaded) >= self._keep:
                    self._loaded.popitem(last=False)
                self._loaded[key] = self._load(checkpoint.source)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def _load(self, source: str) -> LoadedModel:
        tokenizer = tokenizer_of(source, self._flags)
        policy = load_policy(source, self._flags, trainable=False)
        end_ids = stop_ids(tokenizer, policy)
        # The folder's own sampling settings (a repetition penalty, say) would come on top of those of the page.
        policy.model.generation_config = GenerationConfig()
        try:
            model = policy.model.to(self.device, self.dtype)
        except RuntimeError as error:
            raise UserError(f"{source} does not fit on {self.device} ({_first_line(error)})") from None
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return LoadedModel(model, tokenizer, end_ids, context)


@dataclass(frozen=True)
class Reply:
    """An answer so far.

    Attributes:
        text: what to show; while it streams, without an end that may still become a stop text.
        num_tokens: tokens sampled.
        ended: why it is complete; empty while it streams.
    """

    text: str
    num_tokens: int
    ended: str = ""


_ONE_AT_A_TIME = threading.Lock()
"""One answer at a time in this process: the seed is torch's global one, and two would halve each other's speed."""


def reply(
    loaded: LoadedModel,
    prompt: str,
    sampling: Sampling,
    stop: threading.Event,
    stop_texts: Sequence[str] = (),
) -> Iterator[Reply]:
    """Answer `prompt`, a token or a few at a time; the last `Reply` says why it ended.

    Args:
        prompt: the text as the model reads it.
        sampling: how tokens are chosen; `stop_ids` are added to the model's own.
        stop: when set, no more than the token in hand is computed.
        stop_texts: texts that end the answer, and are not part of it; control tokens among them are recognised.

    Closing the iterator ends the computation too. While another answer is being computed this one waits.

    Raises:
        UserError: the prompt leaves no room in the model's context, or the model fails on it.
    """
    ids = encode_prompt(loaded.tokenizer, prompt)
    room = sampling.max_new_tokens
    if loaded.context is not None:
        room = min(room, loaded.context - len(ids))
    if room <= 0:
        raise UserError(
            f"the prompt is {len(ids):,} tokens long, and the model reads {loaded.context:,} with its answer; "
            f"shorten it, or clear the conversation"
        )
    while not _ONE_AT_A_TIME.acquire(timeout=0.1):
        if stop.is_set():
            yield Reply("", 0, STOPPED)
            return
    try:
        yield from _stream(loaded, ids, room, sampling, stop, stop_texts)
    finally:
        _ONE_AT_A_TIME.release()


def _stream(
    loaded: LoadedModel, ids: list[int], room: int, sampling: Sampling, stop: threading.Event, stop_texts: Sequence[str]
) -> Iterator[Reply]:
    tokenizer, halt = loaded.tokenizer, threading.Event()
    control = [text for text in stop_texts if text in special_strings(tokenizer)]
    end_ids = {*loaded.end_ids, *sampling.stop_ids, *tokenizer.convert_tokens_to_ids(control)}
    tokens = _Tokens()
    answer: list[int] = []
    text, cut = "", False
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(_generate, loaded, ids, room, sampling, end_ids, tokens, _Halt(stop, halt))
        work.add_done_callback(lambda _: tokens.queue.put(None))
        try:
            while not (cut or stop.is_set()) and (new := tokens.take()):
                answer += new
                text, cut = cut_at(tokenizer.decode(answer, skip_special_tokens=True), stop_texts)
                yield Reply(_settled(text, stop_texts), len(answer))
        finally:
            halt.set()
    if (error := work.exception()) is not None:
        raise UserError(f"the model failed ({type(error).__name__}: {_first_line(error)})") from error
    if cut or (answer and answer[-1] in end_ids):
        ended = END_OF_TURN
    elif len(answer) < room:
        ended = STOPPED
    else:
        ended = LENGTH if room == sampling.max_new_tokens else CONTEXT
    yield Reply(text.strip(), len(answer), ended)


def _generate(
    loaded: LoadedModel,
    ids: list[int],
    room: int,
    sampling: Sampling,
    end_ids: set[int],
    tokens: _Tokens,
    halt: StoppingCriteria,
) -> None:
    """Run transformers' own `generate`, which hands every token to `tokens`."""
    if sampling.do_sample:
        torch.manual_seed(sampling.seed)
        choice = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    else:
        choice = {}
    prompt = torch.tensor([ids], device=loaded.model.device)
    with torch.inference_mode():
        loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=room,
            do_sample=sampling.do_sample,
            eos_token_id=sorted(end_ids),
            pad_token_id=0,
            use_cache=True,
            streamer=tokens,
            stopping_criteria=StoppingCriteriaList([halt]),
            **choice,
        )


class _Tokens(BaseStreamer):
    """Passes sampled token ids from the thread that computes to the one that shows.

    Ids rather than transformers' own streams of text: those hold a word back until a space follows it.
    """

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.queue.put(value.reshape(-1).tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing: the end of the thread closes the queue, whether `generate` gets there or fails."""

    def take(self) -> list[int]:
        """Wait for one token, and take what else is there; empty at the end."""
        taken: list[int] = []
        while not taken or not self.queue.empty():
            new = self.queue.get()
            if new is None:
                self.queue.put(None)
                break
            taken += new
        return taken


class _Halt(StoppingCriteria):
    """Ends `generate` after the token in hand once one of its events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        is_set = any(event.is_set() for event in self.events)
        return torch.full((input_ids.shape[0],), is_set, dtype=torch.bool, device=input_ids.device)


def cut_at(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of the stop texts, and whether one was found.

    >>> cut_at(" Water it.\\n\\nHuman: And", ["\\n\\nHuman:"])
    (' Water it.', True)
    """
    places = [place for stop in stop_texts if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _settled(text: str, stop_texts: Sequence[str]) -> str:
    """The part of a growing text that later tokens won't take back: no half stop text, no half character."""
    text = text.rstrip("\ufffd")
    halves = [stop[:n] for stop in stop_texts for n in range(len(stop), 0, -1) if text.endswith(stop[:n])]
    return text.removesuffix(max(halves, key=len, default="")).lstrip()


def describe(format: Mapping[str, Any]) -> str:
    """One phrase for the page: how prompts are written."""
    kinds = {
        "dialogue": "Human/Assistant turns",
        "summary": "posts that end with TL;DR:",
        "chat_template": "the tokenizer's chat template",
        "plain": "plain text, each message on its own",
    }
    return kinds.get(format["kind"], format["kind"])


def _device_and_dtype(flags: ServingFlags) -> tuple[torch.device, torch.dtype]:
    name = flags.device
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device={flags.device} can't be used ({_first_line(error)}); give cpu, or auto") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={flags.device} can't be used; give cpu, cuda, cuda:1, mps or auto")
    fast = device.type == "cuda" and fast_bf16("cuda")
    is_bf16 = flags.precision == "bf16-true" or (flags.precision == "auto" and fast)
    return device, torch.bfloat16 if is_bf16 else torch.float32


def _key(checkpoint: Checkpoint) -> tuple[str, int]:
    """Names a model as it is now: `checkpoints/best` is replaced while training goes on."""
    folder = Path(checkpoint.source)
    times = [file.stat().st_mtime_ns for file in folder.iterdir()] if folder.is_dir() else []
    return checkpoint.source, max(times, default=0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
