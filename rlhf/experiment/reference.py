"""Log-probabilities under the reference: computed once and kept on disk, or by a model that follows the policy.

Of a frozen reference, a file beside the data holds what one model said; within it each response has its own key, the
hash of its prompt's and its own tokens. So a changed model or precision starts another file, and a changed row is the
only one computed again, whatever the split, the stage or the order of the rows. The file stays mapped: its numbers take
none of a process's own memory, and a branch some 30 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from safetensors.numpy import save_file
from torch import Tensor, nn

from rlhf.data.splits import Split
from rlhf.errors import UserError
from rlhf.experiment.run import Run
from rlhf.files import WriteError, atomic_write, sweep
from rlhf.models.accumulation import weights_unchanged
from rlhf.models.policy import Policy
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree
from rlhf.untrusted import UnreadableFileError, read_tensors

Row = TypeVar("Row", int, tuple[int, int])

MAX_BRANCHES = 4
"""Responses of one prompt that go through the reference as one tree."""


class Table(NamedTuple):
    """Token log-probabilities of N responses, from a file that stays mapped or in memory.

    Attributes:
        keys: (N,) of 16 bytes; offsets: (N + 1,) where each one's numbers begin in `flat`; flat: (T,) float32.
    """

    keys: np.ndarray
    offsets: np.ndarray
    flat: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, parts: Sequence[np.ndarray]) -> Table:
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(keys, offsets, np.concatenate([np.empty(0, np.float32), *parts], dtype=np.float32))

    def and_also(self, other: Table) -> Table:
        """Both, end to end, in memory."""
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        return Table(np.concatenate([self.keys, other.keys]), offsets, np.concatenate([self.flat, other.flat]))

    def places(self, keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(M,) where these keys stand with as many numbers, the last of equal ones; -1: nowhere."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        order = np.argsort(self.keys, kind="stable")
        found = order[np.searchsorted(self.keys, keys, side="right", sorter=order) - 1]
        there = (self.keys[found] == keys) & (np.diff(self.offsets)[found] == lengths)
        return np.where(there, found, -1)

    def finite(self) -> Table:
        """Those whose numbers all are."""
        bad = np.flatnonzero(~np.isfinite(self.flat))
        if not len(bad):
            return self
        kept = np.ones(len(self.keys), bool)
        kept[np.searchsorted(self.offsets, bad, side="right") - 1] = False
        parts = [self.flat[self.offsets[i] : self.offsets[i + 1]] for i in np.flatnonzero(kept)]
        return Table.of(self.keys[kept], parts)


class ReferenceLogps:
    """Token log-probabilities of every branch of some rows of a split.

    Args:
        rows: numbers, or pairs of numbers.
        flat: (T,) float32, of any branches; a file's stay in the file.
        starts, lengths: of each branch in `flat`, in the order of `rows`.
        device: where they are wanted.

    Attributes:
        computed: how many of the branches had to be computed; the others were on disk.
        nonfinite: the rows with a log-probability that is not finite.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        flat: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        *,
        branches: int,
        computed: int,
        device: torch.device | None = None,
    ) -> None:
        codes = _codes(rows)
        self._order = np.argsort(codes)
        self._sorted, self._flat, self._device = codes[self._order], flat, device
        self._starts, self._lengths, self._branches, self.computed = starts, lengths, branches, computed
        self.nonfinite: list[Row] = []
        if not all(np.isfinite(flat[i : i + _AT_ONCE]).all() for i in range(0, len(flat), _AT_ONCE)):
            self.nonfinite = [row for row in rows if not self.tokens([row]).isfinite().all()]

    def sums(self, rows: Sequence[Row]) -> Tensor:
        """(len(rows) * branches,) float32 log-probabilities of the responses, in packed order.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        return self._placed([np.float32(part.sum(dtype=np.float64)) for part in self._parts(rows)])

    def tokens(self, rows: Sequence[Row]) -> Tensor:
        """(R,) float32 log-probabilities of the response tokens, in the order of the targets of the rows' forest.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        return self._placed(np.concatenate(self._parts(rows)))

    def __call__(self, forest: Forest, rows: list[int]) -> Tensor:
        """(R,) float32 log-probabilities of the targets of the rows' forest; 0 for those in a prompt.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        token_logps = torch.zeros(forest.num_targets, device=self._device)
        token_logps[~forest.target_in_root] = self.tokens(rows)
        return token_logps

    def _placed(self, numbers: Sequence[np.float32] | np.ndarray) -> Tensor:
        return torch.tensor(np.asarray(numbers, dtype=np.float32), device=self._device)

    def _parts(self, rows: Sequence[Row]) -> list[np.ndarray]:
        codes = _codes(rows)
        found = np.minimum(np.searchsorted(self._sorted, codes), len(self._sorted) - 1)
        unknown = [row for row, there in zip(rows, self._sorted[found] == codes, strict=True) if not there]
        if unknown:
            raise KeyError(f"no reference log-probabilities were read for the rows {unknown}")
        index = (self._order[found][:, None] * self._branches + np.arange(self._branches)).ravel()
        starts = self._starts[index]
        return [self._flat[start:stop] for start, stop in zip(starts, starts + self._lengths[index], strict=True)]


_AT_ONCE = 2**22
"""Numbers that are looked through at a time."""


def _codes(rows: Sequence[Row]) -> np.ndarray:
    """(N,) a number for each row, or pair of rows."""
    codes = np.asarray(rows, dtype=np.int64)
    return codes if codes.ndim == 1 else (codes[:, 0] << 32) + codes[:, 1]


class MovingReference:
    """A reference that is drawn after the policy: TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656).

    Args:
        model: the reference as it starts, on this device; of the policy's architecture.
        policy: what it follows, weight by weight.

    Raises:
        UserError: the two have weights of different names or shapes.
    """

    def __init__(self, run: Run, model: Policy, policy: Policy) -> None:
        self._run, self._model = run, model.eval()
        mine = dict(model.named_parameters())
        self._followed = policy.own_parameters()
        for name, parameter in self._followed.items():
            if name not in mine or mine[name].shape != parameter.shape:
                raise UserError(
                    f"--ref_update_interval mixes the weights of policy and --reference, and {name} is not in both, "
                    f"or of two shapes; give a --reference of the policy's architecture, or leave it out"
                )
        self._own = {name: mine[name] for name in self._followed}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that move, for a checkpoint."""
        return self._own

    @torch.no_grad()
    def __call__(self, forest: Forest, rows: list[int]) -> Tensor:
        """(R,) float32 log-probabilities of the forest's targets, as the reference stands now."""
        with self._run.fabric.autocast():
            return self._model(forest)[0]

    @torch.no_grad()
    def update(self, mixup: float) -> None:
        """ref <- mixup * policy + (1 - mixup) * ref: the paper's soft update, and with mixup 1 its hard one."""
        for name, parameter in self._followed.items():
            self._own[name].lerp_(parameter.to(self._own[name].dtype), mixup)


@torch.no_grad()
def reference_logps(
    run: Run, policy: nn.Module, rows: Sequence[Row], tree_of: Callable[[Row], Tree], folder: Path, *,
    micro_batch_size: int,
) -> ReferenceLogps:  # fmt: skip
    """Read the reference's log-probabilities of these rows, computing (and storing) those that are not there.

    Responses to one prompt, also of several rows, share it as far as they are computed together.

    Args:
        policy: the reference, as it stands; its mode is restored.
        rows: those that the run will use, each once: a short run doesn't wait for the others. Numbers, or whatever
            else names a tree.
        tree_of: row to its tree; all rows have the same number of branches.
        folder: where the files are kept; a folder that cannot be written is done without.
    """
    keys, lengths, prompts, branches = _keys(rows, tree_of)
    path = folder / f"{model_fingerprint(policy.module, run.precision)}.safetensors"
    stored = _read(path)
    places = stored.places(keys, lengths)
    missing = np.flatnonzero(places < 0)
    if len(missing):
        once = missing[np.sort(np.unique(keys[missing], return_index=True)[1])]  # equal responses once
        work = _by_prompt(once.tolist(), lambda i: prompts[i // branches])

        def tree_of_part(part: list[int]) -> Tree:
            found = [tree_of(rows[i // branches]).segments for i in part]
            return Tree.of(found[0][0], *(s[1 + i % branches] for s, i in zip(found, part, strict=True)))

        values = _compute(run, policy, work, tree_of_part, micro_batch_size)
        order = [i for part in work for i in part]
        computed = Table.of(keys[order], [logps for part in values for logps in part])
        del values
        if run.rank == 0:
            _write(path, stored.and_also(computed).finite(), run)
        run.fabric.barrier()
        stored = _read(path)
        places = stored.places(keys, lengths)
        if (places < 0).any():  # not finite, or not written
            stored = stored.and_also(computed)
            places = stored.places(keys, lengths)
    run.fabric.barrier()
    return ReferenceLogps(
        rows,
        stored.flat,
        stored.offsets[places],
        lengths,
        branches=branches,
        computed=len(missing),
        device=run.device,
    )


def check_reference(run: Run, stored: ReferenceLogps, split: Split) -> None:
    """Stop before the first step where a step would have to stop: at rows that the reference has no number for.

    Raises:
        UserError: there are such rows, and `--skip_nonfinite_steps` allows no step to be skipped; it names them.
    """
    rows = sorted({row if isinstance(row, int) else row[0] for row in stored.nonfinite})
    if rows and not run.flags.skip_nonfinite_steps:
        raise UserError(
            f"the reference's log-probabilities of rows {rows} of {split.path} are not finite; leave these rows out, "
            f"take another model or --precision=32-true, or skip their steps with --skip_nonfinite_steps"
        )


def model_fingerprint(policy: Policy, precision: str) -> str:
    """Hash of every weight, the adapter in use, and the precision: what the log-probabilities depend on."""
    digest = xxhash.xxh3_128(f"{precision} {policy.adapter} {policy.uses_trees}".encode())
    for name, parameter in policy.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keys(rows: Sequence[Row], tree_of: Callable[[Row], Tree]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Key and number of tokens of each branch, and of each row its prompt's key; the branches of a row."""
    keys, lengths, prompts, branches = bytearray(), array("q"), bytearray(), 1
    for row in rows:
        tree = tree_of(row)
        prompt, *responses = (segment.to(torch.int32).numpy().tobytes() for segment in tree.segments)
        branches = len(responses)
        prompts += xxhash.xxh3_128_digest(prompt)
        for response, segment in zip(responses, tree.segments[1:], strict=True):
            keys += xxhash.xxh3_128_digest(len(prompt).to_bytes(8, "little") + prompt + response)
            lengths.append(len(segment) if prompt else max(0, len(segment) - 1))
    return np.frombuffer(keys, _KEY), np.array(lengths, dtype=np.int64), np.frombuffer(prompts, _KEY), branches


def _by_prompt(items: list[int], prompt_of: Callable[[int], bytes]) -> list[list[int]]:
    """Put those of one prompt together, up to `MAX_BRANCHES`."""
    parts: list[list[int]] = []
    open_part: dict[bytes, list[int]] = {}
    for item in items:
        part = open_part.get(prompt_of(item))
        if part is None or len(part) == MAX_BRANCHES:
            part = open_part[prompt_of(item)] = []
            parts.append(part)
        part.append(item)
    return parts


def _compute(
    run: Run, policy: nn.Module, work: list[list[int]], tree_of_part: Callable[[list[int]], Tree], micro_batch_size: int
) -> list[list[np.ndarray]]:
    """For each part of the work the (T,) log-probabilities of each branch; the devices share the parts."""
    training = policy.training
    policy.eval()
    mine = list(range(run.rank, len(work), run.world_size))
    found: dict[int, list[np.ndarray]] = {}
    with weights_unchanged():
        for batch in run.progress(cut(mine, micro_batch_size=micro_batch_size), "reference log-probabilities"):
            forest = Forest([tree_of_part(work[i]) for i in batch]).to(run.device)
            token_logps, _ = policy(forest)
            per_branch = iter(
                dense[mask].float().cpu().numpy()
                for dense, mask in zip(forest.dense(token_logps), forest.target_mask, strict=True)
            )
            for i in batch:
                found[i] = [next(per_branch) for _ in work[i]]
    policy.train(training)
    if run.world_size > 1:
        gathered: list[dict] = [{}] * run.world_size
        torch.distributed.all_gather_object(gathered, found)
        found = {i: values for part in gathered for i, values in part.items()}
    return [found[i] for i in range(len(work))]


_KEY = np.dtype("S16")
"""16 bytes that numpy compares and sorts."""


def _read(path: Path) -> Table:
    """What the file holds, mapped; nothing where it is not there, not whole, or not what it should be."""
    try:
        found = {name: value.numpy() for name, value in read_tensors(path).items()}
        keys, offsets, flat = found["keys"], found["offsets"], found["logps"]
        shapes = keys.ndim == 2 and keys.shape[1] == 16 and offsets.shape == (len(keys) + 1,) and flat.ndim == 1
        types = keys.dtype == np.uint8 and offsets.dtype == np.int64 and flat.dtype == np.float32
        if not shapes or not types or int(found["checksum"][0]) != _checksum(flat, offsets, keys):
            return _EMPTY
        if offsets[0] != 0 or offsets[-1] != len(flat) or (np.diff(offsets) < 0).any():
            return _EMPTY
        return Table(np.ascontiguousarray(keys).view(_KEY)[:, 0], offsets, flat)
    except (OSError, UnreadableFileError, KeyError, IndexError, TypeError, ValueError):
        return _EMPTY


_EMPTY = Table(np.empty(0, _KEY), np.zeros(1, np.int64), np.empty(0, np.float32))


def _checksum(*parts: np.ndarray) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.intdigest()


def _write(path: Path, table: Table, run: Run) -> None:
    if not len(table.keys):
        return
    keys = table.keys.view(np.uint8).reshape(-1, 16)
    checksum = np.array([_checksum(table.flat, table.offsets, keys)], dtype=np.uint64)
    content = {"keys": keys, "offsets": table.offsets, "logps": table.flat, "checksum": checksum}
    try:
        sweep(path.parent, target=path.name)
        with atomic_write(path) as temporary:
            save_file(content, temporary)
    except (OSError, WriteError) as error:
        run.say(f"note: the reference's log-probabilities will be computed again next time: {error}")
