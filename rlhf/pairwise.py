"""The losses of pairs by name: their flags, which options go with which, and what they are computed from.

Every loss is a function of its own in `rlhf/losses/`; here a pair's token log-probabilities become what it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.flags import CheckedFlags
from rlhf.kl import kl_k3
from rlhf.losses.anchored import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_pair_loss, sppo_hard_loss
from rlhf.losses.log_ratios import alpha_scores, forward_kl_scores, js_scores, ld_weights, wpo_weights
from rlhf.losses.preference import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    robust_loss,
    sigmoid_loss,
)
from rlhf.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from rlhf.losses.supervised import nll_loss
from rlhf.losses.transport import aot_loss, aot_unpaired_loss, matched_by_rank
from rlhf.trees.forest import Forest
from rlhf.trees.rows import halves

OF_MARGINS = ("sigmoid", "robust", "ipo", "hinge", "exo_pair", "discopop")
ANCHORED = ("bco_pair", "nca_pair", "apo_zero", "apo_down", "sppo_hard")
SORTED = ("aot", "aot_unpaired")
WITH_REFERENCE = (*OF_MARGINS, *ANCHORED, *SORTED)
REFERENCE_FREE = ("orpo", "cpo", "simpo")
LOSS_TYPES = (*WITH_REFERENCE, *REFERENCE_FREE)

USED_BY = {
    "beta": (*WITH_REFERENCE, "cpo", "simpo"),
    "label_smoothing": ("sigmoid", "robust", "exo_pair", *SORTED, "cpo", "simpo"),
    "f_divergence": OF_MARGINS,
    "length_normalize": tuple(name for name in WITH_REFERENCE if name != "ipo"),
    "ld_alpha": WITH_REFERENCE,
    "discopop_tau": ("discopop",),
    "cpo_alpha": ("cpo",),
    "simpo_gamma": ("simpo",),
    "orpo_lambda": ("orpo",),
    "reference": WITH_REFERENCE,
    "reference_free": WITH_REFERENCE,
    "ref_update_interval": WITH_REFERENCE,
    "max_chosen_drop": WITH_REFERENCE,
}
"""The losses that an option is for; it is refused where none of them is chosen."""


@dataclass(kw_only=True)
class PairLossFlags(CheckedFlags):
    """Losses of pairs."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """One or more of sigmoid (DPO), robust, ipo, hinge (SLiC), exo_pair, discopop, bco_pair, nca_pair, apo_zero,
    apo_down, sppo_hard, aot, aot_unpaired, and without a reference orpo, cpo, simpo; the README says which paper."""
    loss_weights: list[float] | None = None
    """Weights of the losses of --loss_type in their sum; 1 each unless set."""
    beta: float = 0.1
    """Strength of the pull to the reference; simpo and cpo: scale of the reward (simpo's paper: 2 to 10)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5): sigmoid (conservative DPO), robust, aot, cpo, simpo; exo_pair
    needs one above 0."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence that holds the policy to the reference (f-DPO); the others for losses of the margin alone."""
    f_divergence_alpha: float = 0.5
    """Order of --f_divergence=alpha: 1 is the reverse KL, 0 the forward KL."""
    length_normalize: bool = False
    """Compare means over the tokens, not sums (LN-DPO with sigmoid); ipo, simpo and orpo always do."""
    ld_alpha: float | None = None
    """Weight, in [0, 1], of the tokens with which a response is longer than the other one (LD-DPO); 1 unless set."""
    wpo_weighting: bool = False
    """Weight each pair by how near its responses are to what the policy would say (WPO)."""
    discopop_tau: float = 0.05
    """Width, in (0, 1), of discopop's change from the logistic to the exponential loss."""
    cpo_alpha: float = 1.0
    """Weight, in cpo, of the chosen responses' mean negative log-likelihood a token."""
    simpo_gamma: float = 0.5
    """Reward margin that simpo asks for."""
    orpo_lambda: float = 0.1
    """Weight, in orpo, of the odds ratio beside the likelihood of prompt and chosen response."""
    reference: str | None = None
    """Experiment or model that is the reference; the policy as the run starts, unless set."""
    reference_free: bool = False
    """Leave the reference out, as if it gave every response the same probability."""
    ref_update_interval: int | None = None
    """Move the reference to the policy every so many steps (TR-DPO); it then stays in memory. Never unless set."""
    ref_mixup: float = 0.6
    """How far it moves, in (0, 1]: 1 is TR-DPO's hard update, less a soft one."""
    sft_coef: float = 0.0
    """Weight of the chosen responses' mean negative log-likelihood a token, beside any loss."""
    max_chosen_drop: float = 1.0
    """Warn once the chosen responses have lost this many nats a token against the reference."""

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()
        check_losses(self)

    @property
    def weights(self) -> dict[str, float]:
        """Each loss's weight."""
        return dict(zip(self.loss_type, self.loss_weights or repeat(1.0), strict=False))

    @property
    def uses_reference(self) -> bool:
        return not self.reference_free and any(name in WITH_REFERENCE for name in self.loss_type)

    @property
    def sorts(self) -> bool:
        """Whether a loss compares a pair with others of its step."""
        return any(name in SORTED for name in self.loss_type)

    @property
    def chosen_nll_coef(self) -> float:
        return self.sft_coef + self.weights.get("cpo", 0.0) * self.cpo_alpha

    @property
    def path_nll_coef(self) -> float:
        return self.weights.get("orpo", 0.0)


def check_losses(flags: PairLossFlags) -> None:
    """Refuse what no loss can make use of, and what contradicts itself.

    Raises:
        UserError: names the flag and what to do.
    """
    chosen = flags.loss_type
    named = f"--loss_type {' '.join(chosen)}"
    unknown = [name for name in chosen if name not in LOSS_TYPES]
    if unknown or not chosen:
        raise UserError(f"{named}: {unknown[0] if unknown else 'nothing'} is none of {', '.join(LOSS_TYPES)}; take one")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{named} names a loss twice; name it once, with the sum of its --loss_weights")
    if flags.loss_weights is not None and len(flags.loss_weights) != len(chosen):
        raise UserError(f"--loss_weights needs one weight for each of {named}, {len(chosen)} in all")
    defaults = {f.name: f.default for f in dataclasses.fields(flags)}
    for option, losses in USED_BY.items():
        if getattr(flags, option) != defaults[option] and not set(losses) & set(chosen):
            raise UserError(f"--{option} has no meaning with {named}; it is for {', '.join(losses)}: leave it out")
    unfit = [name for name in chosen if name not in OF_MARGINS]
    if flags.f_divergence != "reverse_kl" and unfit:
        raise UserError(f"--f_divergence={flags.f_divergence} is for {', '.join(OF_MARGINS)}, not for {unfit[0]}")
    if flags.f_divergence_alpha != 0.5 and flags.f_divergence != "alpha":
        raise UserError("--f_divergence_alpha is the order of --f_divergence=alpha; set that too, or leave it out")
    if flags.wpo_weighting and flags.sorts:
        raise UserError(f"--wpo_weighting weights a pair, and {named} compares it with others; leave one of them out")
    if "exo_pair" in chosen and flags.label_smoothing == 0:
        raise UserError("--loss_type exo_pair needs a --label_smoothing above 0; its paper takes 0.001")
    for option in ("reference", "ref_update_interval", "max_chosen_drop"):
        if flags.reference_free and getattr(flags, option) != defaults[option]:
            raise UserError(f"--{option} and --reference_free contradict each other; leave one out")
    if flags.ref_update_interval is None and flags.ref_mixup != 0.6:
        raise UserError("--ref_mixup needs --ref_update_interval, the steps between updates of the reference")


def check_moving_reference(flags: Any) -> None:
    """Raise `UserError` where `--ref_update_interval` would move a reference that is the policy without its adapter."""
    if flags.ref_update_interval and flags.finetune_mode == "lora":
        raise UserError(
            "--ref_update_interval needs a reference with weights of its own, which an adapter switched off is not; "
            "take --finetune_mode=all or last_layer"
        )


class PairLogps(NamedTuple):
    """What losses and curves are made of: (2B,) each, chosen and rejected of a pair in turn, but for the last.

    Attributes:
        policy, reference: summed log-probabilities of the responses, as the losses compare them (`--ld_alpha`).
        policy_sums, ref_sums: the same with every token in full; the reference's are 0 where there is none.
        lengths: tokens of the responses, at least 1.
        path_sums, path_lengths: of prompt and response together, where the prompts are targets (orpo).
        kl: k3 estimates between policy and reference, summed over the response.
        weights: (B,) of the pairs.
    """

    policy: Tensor
    reference: Tensor
    policy_sums: Tensor
    ref_sums: Tensor
    lengths: Tensor
    path_sums: Tensor
    path_lengths: Tensor
    kl: Tensor
    weights: Tensor


class Partners(NamedTuple):
    """AOT: what the pairs at hand are compared with, (B,) each; see `rlhf/losses/transport.py`."""

    ref_margins: Tensor
    rejected: Tensor
    chosen: Tensor


Reference = Callable[[Forest, list[int]], Tensor]
"""(R,) log-probabilities, under the reference, of the targets of a forest and the rows in it; 0 on prompts."""


def pair_logps(
    flags: PairLossFlags, policy: nn.Module, reference: Reference | None, forest: Forest, rows: list[int]
) -> PairLogps:
    """Run the policy, and what there is of a reference, over a forest of pairs."""
    token_logps, log_collisions = policy(forest, collision=flags.wpo_weighting)
    logps, is_response = forest.dense(token_logps), forest.dense(~forest.target_in_root, fill=False)
    ref_logps = torch.zeros_like(logps) if reference is None else forest.dense(reference(forest, rows))
    lengths = is_response.sum(1)
    weights = is_response.float()
    if flags.ld_alpha is not None:
        other_lengths = torch.stack(halves(lengths)[::-1], 1).flatten()
        weights = ld_weights(is_response, other_lengths, ld_alpha=flags.ld_alpha)
    pair_weights = logps.new_ones(len(lengths) // 2)
    if flags.wpo_weighting:
        chosen, rejected = halves(wpo_weights(logps, forest.dense(log_collisions), is_response))
        pair_weights = chosen * rejected
    return PairLogps(
        policy=(logps * weights).sum(1),
        reference=(ref_logps * weights).sum(1),
        policy_sums=(logps * is_response).sum(1),
        ref_sums=(ref_logps * is_response).sum(1),
        lengths=lengths.clamp(min=1),
        path_sums=logps.sum(1),
        path_lengths=forest.target_mask.sum(1).clamp(min=1),
        kl=(kl_k3(logps.detach(), ref_logps) * is_response).sum(1),
        weights=pair_weights,
    )


def pair_losses(flags: PairLossFlags, pairs: PairLogps, partners: Partners | None = None) -> Tensor:
    """(B,) the weighted sum of the losses of each pair, without the likelihood terms (`chosen_nll`, `path_nll`).

    Args:
        partners: of an AOT loss; the pairs at hand are compared with each other unless given.
    """
    losses = [weight * preference_loss(name, flags, pairs, partners) for name, weight in flags.weights.items()]
    return torch.stack(losses).sum(0) * pairs.weights


def preference_loss(name: str, flags: PairLossFlags, pairs: PairLogps, partners: Partners | None) -> Tensor:
    """(B,) the loss of that name, of each pair."""
    beta, e = flags.beta, flags.label_smoothing
    if name in REFERENCE_FREE:
        sums, means = halves(pairs.policy_sums), halves(pairs.policy_sums / pairs.lengths)
    else:
        scores = divergence_scores(flags, pairs.policy - pairs.reference)
        sums, means = halves(scores), halves(scores / pairs.lengths)
    chosen, rejected = means if flags.length_normalize else sums
    match name:
        case "sigmoid":
            return sigmoid_loss(chosen, rejected, beta=beta, label_smoothing=e)
        case "robust":
            return robust_loss(chosen, rejected, beta=beta, label_smoothing=e)
        case "ipo":
            return ipo_loss(*means, beta=beta)
        case "hinge":
            return hinge_loss(chosen, rejected, beta=beta)
        case "exo_pair":
            return exo_pair_loss(chosen, rejected, beta=beta, label_smoothing=e)
        case "discopop":
            return discopop_loss(chosen, rejected, beta=beta, tau=flags.discopop_tau)
        case "bco_pair":
            return bco_pair_loss(chosen, rejected, beta=beta)
        case "nca_pair":
            return nca_pair_loss(chosen, rejected, beta=beta)
        case "apo_zero":
            return apo_zero_loss(chosen, rejected, beta=beta)
        case "apo_down":
            return apo_down_loss(chosen, rejected, beta=beta)
        case "sppo_hard":
            return sppo_hard_loss(chosen, rejected, beta=beta)
        case "cpo":
            return cpo_loss(*sums, beta=beta, label_smoothing=e)
        case "simpo":
            return simpo_loss(*means, beta=beta, gamma=flags.simpo_gamma, label_smoothing=e)
        case "orpo":
            return flags.orpo_lambda * orpo_loss(*means)
    table = sides(flags, pairs)
    partners = partners or match_sides(table)
    if name == "aot":
        return aot_loss(table[:, 0] - table[:, 1], partners.ref_margins, beta=beta, label_smoothing=e)
    return aot_unpaired_loss(chosen, rejected, partners.rejected, partners.chosen, beta=beta, label_smoothing=e)


def divergence_scores(flags: PairLossFlags, log_ratios: Tensor) -> Tensor:
    """The derivative of `--f_divergence` at the log-ratios, shaped like them; of the reverse KL the log-ratios."""
    match flags.f_divergence:
        case "forward_kl":
            return forward_kl_scores(log_ratios)
        case "js":
            return js_scores(log_ratios)
        case "alpha":
            return alpha_scores(log_ratios, alpha=flags.f_divergence_alpha)
    return log_ratios


def sides(flags: PairLossFlags, pairs: PairLogps) -> Tensor:
    """(B, 4) what AOT sorts: the policy's log-probabilities of chosen and rejected, and the reference's."""
    per = pairs.lengths if flags.length_normalize else 1
    return torch.stack([*halves(pairs.policy / per), *halves(pairs.reference / per)], 1)


def match_sides(table: Tensor) -> Partners:
    """Match the `sides` (N, 4) of pairs with each other."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = table.detach().unbind(1)
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return Partners(
        ref_margins=matched_by_rank(policy_chosen - policy_rejected, ref_chosen - ref_rejected),
        rejected=matched_by_rank(chosen, rejected),
        chosen=matched_by_rank(rejected, chosen),
    )


def pair_rewards(flags: PairLossFlags, pairs: PairLogps) -> Tensor:
    """(2B,) the reward that the losses give each response, for the curves: beta times its log-ratio.

    Where all losses are free of a reference, that of the first: beta times the log-probability, summed (cpo) or a
    token (simpo), or orpo_lambda times the latter (orpo).
    """
    first = flags.loss_type[0]
    if not any(name in WITH_REFERENCE for name in flags.loss_type):
        logps = pairs.policy_sums if first == "cpo" else pairs.policy_sums / pairs.lengths
        return (flags.orpo_lambda if first == "orpo" else flags.beta) * logps
    per = pairs.lengths if flags.length_normalize else 1
    return implicit_rewards(pairs.policy / per, pairs.reference / per, beta=flags.beta)


def chosen_nll(pairs: PairLogps) -> Tensor:
    """(B,) negative log-likelihood of the chosen responses, summed over their tokens: `--sft_coef` and CPO."""
    return nll_loss(halves(pairs.policy_sums)[0])


def path_nll(pairs: PairLogps) -> Tensor:
    """(B,) the same of prompt and chosen response: ORPO, as its authors' code and TRL have it."""
    return nll_loss(halves(pairs.path_sums)[0])
