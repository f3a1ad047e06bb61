"""Seeds of what a step draws: a stream for each purpose, seed and step, whatever the batch and the devices."""

from __future__ import annotations

import hashlib


def seed_of_step(seed: int, step: int, purpose: str) -> int:
    """Seed, below 2^63, of what step `step` of a run with `--seed=<seed>` draws for one purpose.

    The hash of purpose and seed, plus the step: within a run no two steps have the same one, and runs whose seeds are
    neighbours, or two purposes of one run, begin at unrelated places instead of a step apart.

    >>> seed_of_step(42, 1, "sampling") - seed_of_step(42, 0, "sampling")
    1
    >>> seed_of_step(43, 0, "sampling") == seed_of_step(42, 1, "sampling")
    False
    """
    digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + step) % 2**63
