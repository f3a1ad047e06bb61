"""Which rows, and which tensor, are behind a step that is not finite: asked only once its one check has failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlhf.trees.forest import Forest


class Sighting:
    """A quantity of one micro-batch, and the gradient that comes back to it, until the step's update.

    Args:
        what: its name, in the plural.
        values: any shape. With `forest` one number a target of it, or a packed position of `at`; without, the first
            axis holds the micro-batch's rows in order, equally many numbers each, and a scalar belongs to all.
        rows: of the split, one a tree.
    """

    def __init__(
        self, what: str, values: Tensor, rows: Sequence[int], forest: Forest | None = None, at: Tensor | None = None
    ) -> None:
        self.what, self.values, self.rows = what, values.detach(), rows
        # Not the forest itself, which holds its masks.
        self.at = forest.target_index if forest is not None and at is None else at
        self.stops = [stop for _, stop in forest.trees] if forest is not None else []
        self.gradient: Tensor | None = None
        if values.requires_grad:
            values.register_hook(self._keep)

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()

    def guilty_rows(self, tensor: Tensor) -> set[int]:
        """The rows of the elements that are not finite, of `values` or of `gradient`."""
        bad = ~tensor.isfinite()
        if self.at is not None:
            stops = torch.tensor(self.stops, device=self.at.device)
            return {self.rows[i] for i in torch.bucketize(self.at[bad], stops, right=True).tolist()}
        if tensor.ndim == 0:
            return set(self.rows) if bad else set()
        return {row for row, part in zip(self.rows, bad.view(len(self.rows), -1).any(1).tolist(), strict=True) if part}


def guilty(sightings: Iterable[Sighting]) -> list[tuple[str, list[int]]]:
    """What is not finite, in the order of its being seen: (name, rows of the split), quantities before gradients.

    >>> guilty([Sighting("losses", torch.tensor([1.0, float("nan")]), [7, 3])])
    [('losses', [3])]
    """
    values: dict[str, set[int]] = {}
    gradients: dict[str, set[int]] = {}
    for sighting in sightings:
        values.setdefault(sighting.what, set()).update(sighting.guilty_rows(sighting.values))
        if sighting.gradient is not None:
            found = sighting.guilty_rows(sighting.gradient)
            gradients.setdefault(f"gradients of the {sighting.what}", set()).update(found)
    return [(what, sorted(rows)) for what, rows in {**values, **gradients}.items() if rows]


def first_nonfinite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The name of the first tensor with an element that is not finite."""
    return next((name for name, x in tensors.items() if x is not None and not x.isfinite().all()), None)


def names_of(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """These parameters by the names that they have in the modules; by number where they are in none."""
    known = {}
    for name, p in (item for module in modules for item in module.named_parameters()):
        for wrapper in ("_forward_module.", "module.", "model."):  # Fabric's, DDP's and the role's
            name = name.removeprefix(wrapper)
        known[id(p)] = name
    return {known.get(id(p), f"parameter {i}"): p for i, p in enumerate(parameters)}
