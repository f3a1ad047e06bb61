"""Log-probabilities under the reference: computed once and kept on disk, or by a model that follows the policy.

Of a frozen reference, a file beside the data holds what one model said; within it each response has its own key, the
hash of its prompt's and its own tokens. So a changed model or precision starts another file, and a changed row is the
only one computed again, whatever the split, the stage or the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.experiment.run import Run
from rlhf.files import atomic_write
from rlhf.models.policy import Policy
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree


class ReferenceLogps:
    """Token log-probabilities of every branch of some rows of a split.

    Args:
        flat: (T,) all of them, end to end; `offsets`: where each branch begins, in the order of `rows`.

    Attributes:
        computed: how many of the branches had to be computed; the others were on disk.
    """

    def __init__(self, rows: Sequence[int], flat: Tensor, offsets: list[int], branches: int, computed: int) -> None:
        self._place = {row: i for i, row in enumerate(rows)}
        self._flat, self._offsets, self._branches, self.computed = flat, offsets, branches, computed

    def sums(self, rows: list[int]) -> Tensor:
        """(len(rows) * branches,) float32 log-probabilities of the responses, in packed order.

        Raises:
            KeyError: a row that was not asked for when they were read.
        """
        return torch.stack([part.double().sum().float() for part in self._parts(rows)])

    def tokens(self, rows: list[int]) -> Tensor:
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

    def _parts(self, rows: list[int]) -> list[Tensor]:
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
    run: Run, policy: nn.Module, rows: Sequence[int], tree_of: Callable[[int], Tree], folder: Path, *,
    micro_batch_size: int,
) -> ReferenceLogps:  # fmt: skip
    """Read the reference's log-probabilities of these rows, computing (and storing) those that are not there.

    Args:
        policy: the reference, as it stands; its mode is restored.
        rows: those that the run will use, each once: a short run doesn't wait for the others.
        tree_of: row number to its tree; all rows have the same number of branches.
        folder: where the files are kept; a folder that cannot be written is done without.
    """
    keys, lengths, branches = _keys(rows, tree_of)
    path = folder / f"{model_fingerprint(policy.module, run.precision)}.safetensors"
    known = _read(path)
    missing = sorted({i // branches for i, key in enumerate(keys) if key not in known})
    num_missing = sum(key not in known for key in keys)
    if missing:
        computed = _compute(run, policy, [rows[i] for i in missing], tree_of, micro_batch_size)
        for i, values in zip(missing, computed, strict=True):
            for b, part in enumerate(values):
                known[keys[i * branches + b]] = part
        if run.rank == 0:
            _write(path, known, run)
    offsets = [0, *accumulate(lengths)]
    flat = torch.from_numpy(np.concatenate([known[key] for key in keys]) if keys else np.empty(0, np.float32))
    run.fabric.barrier()
    return ReferenceLogps(rows, flat.to(run.device), offsets, branches, num_missing)


def model_fingerprint(policy: Policy, precision: str) -> str:
    """Hash of every weight, the adapter in use, and the precision: what the log-probabilities depend on."""
    digest = xxhash.xxh3_128(f"{precision} {policy.adapter} {policy.uses_trees}".encode())
    for name, parameter in policy.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keys(rows: Sequence[int], tree_of: Callable[[int], Tree]) -> tuple[list[bytes], list[int], int]:
    keys, lengths, branches = [], [], 1
    for row in rows:
        tree = tree_of(row)
        prompt, *responses = (segment.to(torch.int32).numpy().tobytes() for segment in tree.segments)
        branches = len(responses)
        for response, segment in zip(responses, tree.segments[1:], strict=True):
            keys.append(xxhash.xxh3_128_digest(len(prompt).to_bytes(8, "little") + prompt + response))
            lengths.append(len(segment) if prompt else max(0, len(segment) - 1))
    return keys, lengths, branches


def _compute(
    run: Run, policy: nn.Module, rows: list[int], tree_of: Callable[[int], Tree], micro_batch_size: int
) -> list[list[np.ndarray]]:
    """For each row the (T,) log-probabilities of each branch; the devices share the rows."""
    training = policy.training
    policy.eval()
    mine = list(range(run.rank, len(rows), run.world_size))
    parts: dict[int, list[np.ndarray]] = {}
    for batch in run.progress(cut(mine, micro_batch_size=micro_batch_size), "reference log-probabilities"):
        forest = Forest([tree_of(rows[i]) for i in batch]).to(run.device)
        token_logps, _ = policy(forest)
        per_branch = [
            dense[mask].float().cpu().numpy()
            for dense, mask in zip(forest.dense(token_logps), forest.target_mask, strict=True)
        ]
        branches = len(per_branch) // len(batch)
        for k, i in enumerate(batch):
            parts[i] = per_branch[k * branches : (k + 1) * branches]
    policy.train(training)
    if run.world_size > 1:
        gathered: list[dict] = [{}] * run.world_size
        torch.distributed.all_gather_object(gathered, parts)
        parts = {i: values for part in gathered for i, values in part.items()}
    return [parts[i] for i in range(len(rows))]


def _read(path: Path) -> dict[bytes, np.ndarray]:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError):
        return {}
    keys, offsets, flat = stored["keys"], stored["offsets"], stored["logps"]
    digest = int(stored["checksum"][0])
    if xxhash.xxh3_64_intdigest(flat.tobytes() + offsets.tobytes() + keys.tobytes()) != digest:
        return {}
    return {keys[i].tobytes(): flat[offsets[i] : offsets[i + 1]] for i in range(len(keys))}


def _write(path: Path, known: dict[bytes, np.ndarray], run: Run) -> None:
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16)
    flat = np.concatenate(list(known.values())).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in known.values()])]).astype(np.int64)
    checksum = xxhash.xxh3_64_intdigest(flat.tobytes() + offsets.tobytes() + keys.tobytes())
    table = {"keys": keys.copy(), "offsets": offsets, "logps": flat, "checksum": np.array([checksum], dtype=np.uint64)}
    try:
        with atomic_write(path) as temporary:
            save_file(table, temporary)
    except OSError as error:
        run.say(f"note: {path} cannot be written ({error.strerror}); the reference will be computed again next time")
