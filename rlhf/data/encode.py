"""Source rows to token ids, some hundred at a time: the part of data preparation that runs in many processes."""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from rlhf.data.packed import IGNORE_INDEX, PackedRows, pack
from rlhf.data.rows import Response, Row, UnusableRowError
from rlhf.data.sources import Chunk, decode
from rlhf.data.text import continuation_ids_of, prompt_ids_of, text_rule, with_eos
from rlhf.errors import UserError

BOUNDARY_SAMPLE = 1000
"""Rows of each source whose prompt and response are also tokenised in one piece, to count those that differ."""

CUT_PROMPT, CUT_RESPONSE = 1, 2
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies


@dataclass(frozen=True)
class Limits:
    """What fits: tokens of the prompt, of one response with its EOS, and of both together."""

    max_length: int
    max_prompt_length: int
    max_response_length: int | None
    truncate: bool


@dataclass
class Encoded:
    """What one chunk gave. `key` is the seeded 64-bit hash of the prompt's text: equal prompts have equal keys."""

    rows: PackedRows
    source_row: np.ndarray
    key: np.ndarray
    cut: np.ndarray
    dropped: dict[str, list[int]]
    """Keys of the rows that were dropped, by reason."""
    skipped: list[dict[str, Any]]
    """The rows that could not be used: file, line, reason, fix, bad."""
    lengths: dict[str, list[int]]
    """Tokens of every prompt and response met, dropped or not."""
    kinds: collections.Counter
    boundary: tuple[int, int]
    """Texts also tokenised in one piece, and those whose ids differ."""
    example: tuple[int, str, list[int]] | None
    """Key, text and ids of the prompt with the lowest key."""
    file: str
    num_read: int
    num_tokens: int
    progress: int


@dataclass
class _Sequence:
    """One prompt with one response, in ids, and which of the response's are learnt."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)


class RowEncoder:
    """Encodes chunks for one stage. Everything it holds can be sent to another process."""

    def __init__(
        self,
        stage: str,
        tokenizer: PreTrainedTokenizerBase,
        parse: Callable[[Any], Row],
        limits: Limits,
        seed: int,
    ) -> None:
        self.stage, self.tokenizer, self.parse, self.limits, self.seed = stage, tokenizer, parse, limits, seed
        self.rule = text_rule(tokenizer)

    def __call__(self, chunk: Chunk, first_row: int) -> Encoded:
        """Encode the rows of `chunk`, of which the first is row `first_row` of its source."""
        result = Encoded(
            pack(self.stage, []), *(np.zeros(0) for _ in range(3)), collections.defaultdict(list), [],
            collections.defaultdict(list), collections.Counter(), (0, 0), None, chunk.file, len(chunk.entries), 0,
            chunk.progress,
        )  # fmt: skip
        rows: list[tuple[int, int, Row]] = []
        for i, entry in enumerate(chunk.entries):
            try:
                row = self.parse(decode(entry))
            except UnusableRowError as why:
                content = repr(entry.content).encode("utf-8", "surrogatepass")
                result.dropped[why.reason].append(self._key(content))
                result.skipped.append(
                    {"file": chunk.file, "line": entry.line, "reason": why.reason, "fix": why.fix, "bad": why.bad}
                )
                continue
            rows.append((first_row + i, self._key(row.prompt.encode()), row))
            result.kinds[row.kind] += 1
        self._encode(rows, result)
        return result

    def _encode(self, rows: list[tuple[int, int, Row]], result: Encoded) -> None:
        prompts = prompt_ids_of(self.tokenizer, [row.prompt for _, _, row in rows], self.rule)
        texts = [text for _, _, row in rows for response in row.responses for text, _ in response.pieces]
        pieces = iter(continuation_ids_of(self.tokenizer, texts, self.rule))
        result.num_tokens += sum(map(len, prompts))
        kept: list[dict[str, Any]] = []
        source_rows, keys, cuts = [], [], []
        for (source_row, key, row), ids in zip(rows, prompts, strict=True):
            responses = [self._join(response, pieces) for response in row.responses]
            result.num_tokens += sum(len(response) for response, _ in responses)
            if source_row < BOUNDARY_SAMPLE:
                self._check_boundary(row, ids, responses, result)
            result.lengths["prompt"].append(len(ids))
            for response, _ in responses:
                result.lengths["response"].append(len(response))
            for output, label in self._outputs(row, responses):
                sequences, cut, reason = self._fit(row, ids, output)
                if reason is not None:
                    result.dropped[reason].append(key)
                    continue
                kept.append(self._output_row(row, sequences, label))
                source_rows.append(source_row)
                keys.append(key)
                cuts.append(cut)
                if result.example is None or key < result.example[0]:
                    result.example = (key, *self._example(row, sequences[0].prompt, cut))
        result.rows = pack(self.stage, kept)
        result.source_row = np.array(source_rows, dtype=np.int64)
        result.key = np.array(keys, dtype=np.uint64)
        result.cut = np.array(cuts, dtype=np.uint8)

    def _join(self, response: Response, pieces: Iterator[list[int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learnt: list[bool] = []
        for _, is_learnt in response.pieces:
            piece = next(pieces)
            ids += piece
            learnt += [is_learnt] * len(piece)
        if not response.closed:
            ids = with_eos(ids, self.rule)
            learnt += [True] * (len(ids) - len(learnt))
        return ids, learnt

    def _outputs(self, row: Row, responses: list) -> Iterator[tuple[list, bool]]:
        """The rows that one source row gives: a labelled one for each response, or all in one."""
        if self.stage == "feedback":
            for response, label in zip(responses, row.labels, strict=True):
                yield [response], label
        else:
            yield responses, True

    def _fit(self, row: Row, prompt: list[int], responses: list) -> tuple[list[_Sequence], int, str | None]:
        """Apply the limits: the sequences, what was cut, and why the row is dropped if it is."""
        limits, cut = self.limits, 0
        room = min(limits.max_prompt_length, limits.max_length - (1 if responses else 0))
        if len(prompt) > room:
            shorter = self._shorten(row, room) if limits.truncate or row.always_shorten else None
            if shorter is None and not limits.truncate:
                return [], 0, f"prompt over --max_prompt_length={limits.max_prompt_length}"
            front = list(self.rule.front)
            prompt = shorter or front + prompt[len(prompt) - (room - len(front)) :]
            cut |= CUT_PROMPT
        sequences = []
        for ids, learnt in responses:
            if row.kind != "chat_template" and self.rule.eos in ids[:-1]:
                return [], 0, "EOS token inside the response"
            room = limits.max_length - len(prompt)
            if limits.max_response_length is not None:
                if len(ids) > limits.max_response_length and not limits.truncate:
                    return [], 0, f"response over --max_response_length={limits.max_response_length}"
                room = min(room, limits.max_response_length)
            if len(ids) > room:
                if not limits.truncate:
                    return [], 0, f"prompt and response over --max_length={limits.max_length}"
                ids, learnt = ids[:room], learnt[:room]
                cut |= CUT_RESPONSE
            sequences.append(_Sequence(prompt, ids, learnt))
        if any(not any(sequence.learnt) for sequence in sequences):
            return [], 0, "no token to learn"
        if len(sequences) == 2 and cut & CUT_RESPONSE and sequences[0].response == sequences[1].response:
            return [], 0, "chosen equals rejected once both are cut"
        return sequences or [_Sequence(prompt)], cut, None

    def _shorten(self, row: Row, room: int) -> list[int] | None:
        if row.shorten is None:
            return None

        def fits(text: str) -> bool:
            return len(prompt_ids_of(self.tokenizer, [text], self.rule)[0]) <= room

        text = row.shorten(fits)
        return None if text is None else prompt_ids_of(self.tokenizer, [text], self.rule)[0]

    def _output_row(self, row: Row, sequences: list[_Sequence], label: bool) -> dict[str, Any]:
        whole = [sequence.prompt + sequence.response for sequence in sequences]
        output: dict[str, Any] = {"prompt_len": len(sequences[0].prompt)}
        if self.stage == "preference":
            return output | {"chosen_input_ids": whole[0], "rejected_input_ids": whole[1]}
        output["input_ids"] = whole[0]
        if self.stage == "feedback":
            output["label"] = label
        elif self.stage == "prompts":
            output["reference"] = row.reference
        else:
            pairs = zip(sequences[0].response, sequences[0].learnt, strict=True)
            learnt = [token if is_learnt else IGNORE_INDEX for token, is_learnt in pairs]
            output["targets"] = [IGNORE_INDEX] * len(sequences[0].prompt) + learnt
        return output

    def _example(self, row: Row, prompt: list[int], cut: int) -> tuple[str, list[int]]:
        front = len(self.rule.front)
        return (self.tokenizer.decode(prompt[front:]) if cut & CUT_PROMPT else row.prompt), prompt

    def _check_boundary(self, row: Row, prompt: list[int], responses: list, result: Encoded) -> None:
        """Count the texts that get other ids in one piece than in two (C38, A6)."""
        checked, differ = result.boundary
        for response, (ids, _) in zip(row.responses, responses, strict=True):
            text = row.prompt + "".join(piece for piece, _ in response.pieces)
            whole = prompt_ids_of(self.tokenizer, [text], self.rule)[0]
            checked += 1
            differ += prompt + ids != (whole if response.closed else with_eos(whole, self.rule))
        result.boundary = checked, differ

    def _key(self, content: bytes) -> int:
        return xxhash.xxh3_64_intdigest(content, seed=self.seed & (2**64 - 1))


_worker_encoder: RowEncoder | None = None


def encode_all(encoder: RowEncoder, chunks: Iterable[Chunk], num_workers: int) -> Iterator[Encoded]:
    """Encode all chunks, in order, in `num_workers` processes (1: in this one, on the tokenizer's own threads).

    A few chunks for each process are under way at a time, so memory does not grow with the data.
    """
    if num_workers <= 1:
        first_row = 0
        for chunk in chunks:
            yield encoder(chunk, first_row)
            first_row += len(chunk.entries)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: collections.deque[Future] = collections.deque()
    first_row = 0
    with (
        _without_tokenizer_threads(),
        ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(encoder, os.getpid())) as pool,
    ):
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_in_worker, chunk, first_row))
                first_row += len(chunk.entries)
                if len(waiting) >= 3 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenising process was killed, most likely for want of memory; give fewer --num_workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(encoder: RowEncoder, parent: int) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    if sys.platform == "linux":  # elsewhere a worker whose parent was killed stays
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _encode_in_worker(chunk: Chunk, first_row: int) -> Encoded:
    return _worker_encoder(chunk, first_row)


@contextmanager
def _without_tokenizer_threads() -> Iterator[None]:
    """One thread in each process; it also keeps the tokenizers library from warning about the fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
