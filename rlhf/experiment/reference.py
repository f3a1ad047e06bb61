"""Log-probabilities under the reference: computed once and kept on disk, or by a model that follows the policy.

Of a frozen reference, a file beside the data holds what one model said; within it each response has its own key, the
hash of its prompt's and its own tokens. So a changed model or precision starts another file, and a changed row is the
only one computed again, whatever the split, the stage or the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import xxhash
from safetensors.numpy import save_file
from torch import Tensor, nn

from rlhf.data.splits import Split
from rlhf.errors import UserError
from rlhf.experiment.run import Run
from rlhf.files import WriteError, atomic_write, sweep
from rlhf.models.policy import Policy
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree
from rlhf.untrusted import UnreadableFileError, read_tensors

Row = TypeVar("Row", bound=Hashable)

MAX_BRANCHES = 4
"""Responses of one prompt that go through the reference as one tree."""


class ReferenceLogps:
    """Token log-probabilities of every branch of some rows of a split.

    Args:
        flat: (T,) all of them, end to end; `offsets`: where each branch begins, in the order of `rows`.

    Attributes:
        computed: how many of the branches had to be computed; the others were on disk.
        nonfinite: the rows with a log-probability that is not finite.
    """

    def __init__(
        self, rows: Sequence[Hashable], flat: Tensor, offsets: list[int], branches: int, computed: int
    ) -> None:
        self._place = {row: i for i, row in enumerate(rows)}
        self._flat, self._offsets, self._branches, self.computed = flat, offsets, branches, computed
        self.nonfinite: list[Hashable] = []
        if not flat.isfinite().all():
            self.nonfinite = [row for row in rows if not self.tokens([row]).isfinite().all()]

    def sums(self, rows: Sequence[Hashable]) -> Tensor:
        """(len(rows) * branches,) float32 log-probabilities of the responses, in packed order.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        return torch.stack([part.double().sum().float() for part in self._parts(rows)])

    def tokens(self, rows: Sequence[Hashable]) -> Tensor:
        """(R,) float32 log-probabilities of the response tokens, in the order of the targets of the rows' forest.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        return torch.cat(self._parts(rows))

    def __call__(self, forest: Forest, rows: list[int]) -> Tensor:
        """(R,) float32 log-probabilities of the targets of the rows' forest; 0 for those in a prompt.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        token_logps = torch.zeros(forest.num_targets, device=self._flat.device)
        token_logps[~forest.target_in_root] = self.tokens(rows)
        return token_logps

    def _parts(self, rows: Sequence[Hashable]) -> list[Tensor]:
        unknown = [row for row in rows if row not in self._place]
        if unknown:
            raise KeyError(f"no reference log-probabilities were read for the rows {unknown}")
        index = [self._place[row] * self._branches + b for row in rows for b in range(self._branches)]
        return [self._flat[self._offsets[i] : self._offsets[i + 1]] for i in index]


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
    tokens = dict(zip(keys, lengths, strict=True))
    stored = _read(path).items()
    known = {key: logps for key, logps in stored if logps.shape == (tokens.get(key, len(logps)),)}
    num_missing = sum(key not in known for key in keys)
    if num_missing:
        missing = {key: i for i, key in enumerate(keys) if key not in known}  # equal responses once
        work = _by_prompt(list(missing.values()), lambda i: prompts[i // branches])

        def tree_of_part(part: list[int]) -> Tree:
            found = [tree_of(rows[i // branches]).segments for i in part]
            return Tree.of(found[0][0], *(s[1 + i % branches] for s, i in zip(found, part, strict=True)))

        for part, values in zip(work, _compute(run, policy, work, tree_of_part, micro_batch_size), strict=True):
            known.update((keys[i], logps) for i, logps in zip(part, values, strict=True))
        if run.rank == 0:
            _write(path, {key: logps for key, logps in known.items() if np.isfinite(logps).all()}, run)
    offsets = [0, *accumulate(lengths)]
    flat = torch.from_numpy(np.concatenate([known[key] for key in keys]) if keys else np.empty(0, np.float32))
    run.fabric.barrier()
    return ReferenceLogps(rows, flat.to(run.device), offsets, branches, num_missing)


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


def _keys(rows: Sequence[Row], tree_of: Callable[[Row], Tree]) -> tuple[list[bytes], list[int], list[bytes], int]:
    """Key and number of tokens of each branch, and of each row its prompt's key; the branches of a row."""
    keys, lengths, prompts, branches = [], [], [], 1
    for row in rows:
        tree = tree_of(row)
        prompt, *responses = (segment.to(torch.int32).numpy().tobytes() for segment in tree.segments)
        branches = len(responses)
        prompts.append(xxhash.xxh3_128_digest(prompt))
        for response, segment in zip(responses, tree.segments[1:], strict=True):
            keys.append(xxhash.xxh3_128_digest(len(prompt).to_bytes(8, "little") + prompt + response))
            lengths.append(len(segment) if prompt else max(0, len(segment) - 1))
    return keys, lengths, prompts, branches


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


def _read(path: Path) -> dict[bytes, np.ndarray]:
    try:
        stored = {name: value.numpy() for name, value in read_tensors(path).items()}
        keys, offsets, flat = stored["keys"], stored["offsets"], stored["logps"]
        digest = int(stored["checksum"][0])
        if xxhash.xxh3_64_intdigest(flat.tobytes() + offsets.tobytes() + keys.tobytes()) != digest:
            return {}
        return {keys[i].tobytes(): flat[offsets[i] : offsets[i + 1]] for i in range(len(keys))}
    except (OSError, UnreadableFileError, KeyError, IndexError, TypeError, ValueError):
        return {}


def _write(path: Path, known: dict[bytes, np.ndarray], run: Run) -> None:
    if not known:
        return
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16)
    flat = np.concatenate(list(known.values())).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in known.values()])]).astype(np.int64)
    checksum = xxhash.xxh3_64_intdigest(flat.tobytes() + offsets.tobytes() + keys.tobytes())
    table = {"keys": keys.copy(), "offsets": offsets, "logps": flat, "checksum": np.array([checksum], dtype=np.uint64)}
    try:
        sweep(path.parent, target=path.name)
        with atomic_write(path) as temporary:
            save_file(table, temporary)
    except (OSError, WriteError) as error:
        run.say(f"note: the reference's log-probabilities will be computed again next time: {error}")
