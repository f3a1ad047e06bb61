"""The losses of pairs by name, on forests: against TRL 1.16.0 in value and gradient, and which options go together."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import pairwise
from rlhf.errors import UserError
from rlhf.flags import parse
from rlhf.pairwise import (
    LOSS_TYPES,
    OF_MARGINS,
    REFERENCE_FREE,
    USED_BY,
    WITH_REFERENCE,
    PairLossFlags,
    match_sides,
    pair_logps,
    pair_losses,
    sides,
)
from rlhf.rlhf_dpo import DPOFlags
from rlhf.trees.forest import Forest
from rlhf.trees.rows import halves, pair_tree

LENGTHS = [(6, 1), (2, 5), (3, 4)]
"""Tokens of the chosen and the rejected response of three pairs."""
NEEDS = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2}}


class Pairs:
    """Three pairs of random token log-probabilities, as a forest for us and padded for TRL, with one leaf for both."""

    def __init__(self, *, prompt_targets: bool = False, spread: float = 2.0) -> None:
        rows = [
            {
                "prompt_len": 2 + i,
                "chosen_input_ids": torch.arange(2 + i + chosen),
                "rejected_input_ids": torch.arange(2 + i + rejected),
            }
            for i, (chosen, rejected) in enumerate(LENGTHS)
        ]
        self.forest = Forest([pair_tree(row, prompt_targets=prompt_targets) for row in rows])
        draw = torch.Generator().manual_seed(0)
        size = (self.forest.num_targets,)
        self.token_logps = (-torch.rand(size, generator=draw) * spread).requires_grad_()
        self.ref_logps = -torch.rand(size, generator=draw) * spread
        self.collisions = -torch.rand(size, generator=draw) * spread

    def policy(self, forest: Forest, *, collision: bool) -> tuple[Tensor, Tensor | None]:
        return self.token_logps, self.collisions if collision else None

    def logps(self, flags: PairLossFlags) -> pairwise.PairLogps:
        free = flags.reference_free or not flags.uses_reference
        return pair_logps(flags, self.policy, None if free else lambda *_: self.ref_logps, self.forest, [0, 1, 2])


def value_and_gradient(loss: Tensor, leaf: Tensor) -> tuple[float, Tensor]:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


def in_trl(pairs: Pairs, flags: PairLossFlags, loss_types: list[str]) -> tuple[float, Tensor]:
    """TRL's own DPOTrainer._compute_loss, on a stub model that gives these token log-probabilities."""
    trainer_class = pytest.importorskip("trl").DPOTrainer

    def padded(per_target: Tensor) -> Tensor:  # chosen rows, then rejected ones
        return torch.cat(halves(pairs.forest.dense(per_target)))

    mask = torch.cat(halves(pairs.forest.target_mask))
    completion_mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], dim=1)
    ones = torch.ones_like(completion_mask)

    def model(which: Tensor) -> Any:
        values = padded(which)
        zeros = torch.zeros_like(values)
        return lambda **_: SimpleNamespace(
            log_probs=values,
            log_sum_sq_probs=padded(pairs.collisions),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=mask,
        )

    def same(x: Tensor) -> Tensor:
        return x

    whole = torch.nn.Identity()
    whole.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=whole,
        ref_model=model(pairs.ref_logps),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        args=SimpleNamespace(discopop_tau=flags.discopop_tau, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=flags.ld_alpha,
        precompute_ref_logps=False,
        f_divergence_type={"js": "js_divergence", "alpha": "alpha_divergence"}.get(
            flags.f_divergence, flags.f_divergence
        ),
        f_alpha_divergence_coef=flags.f_divergence_alpha,
        loss_types=loss_types,
        loss_weights=flags.loss_weights or [1.0] * len(loss_types),
        label_smoothing=flags.label_smoothing,
        beta=flags.beta,
        use_weighting=flags.wpo_weighting,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": completion_mask}
    return value_and_gradient(
        trainer_class._compute_loss(trainer, model(pairs.token_logps), inputs, False), pairs.token_logps
    )


def agree(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    """Values and gradients to 1e-5, and a gradient that is not all zeros."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    assert theirs[1].abs().max() > 1e-3


def here(pairs: Pairs, flags: PairLossFlags) -> tuple[float, Tensor]:
    return value_and_gradient(pair_losses(flags, pairs.logps(flags)).mean(), pairs.token_logps)


OPTIONS: list[dict[str, Any]] = [
    *({"loss_type": [name], "beta": beta, **NEEDS.get(name, {})} for name in WITH_REFERENCE for beta in (0.1, 0.7)),
    *(
        {"loss_type": [name], "f_divergence": kind, "beta": 0.3, **NEEDS.get(name, {})}
        for name in OF_MARGINS
        for kind in ("forward_kl", "js", "alpha")
    ),
    {"loss_type": ["sigmoid"], "f_divergence": "alpha", "f_divergence_alpha": 1.8},
    {"loss_type": ["sigmoid"], "f_divergence": "alpha", "f_divergence_alpha": 1.0},
    *({"loss_type": [name], "ld_alpha": 0.3, "beta": 0.3, **NEEDS.get(name, {})} for name in WITH_REFERENCE),
    *(
        {"loss_type": [name], "wpo_weighting": True, "beta": 0.3, **NEEDS.get(name, {})}
        for name in WITH_REFERENCE
        if name not in (*pairwise.SORTED, "hinge")  # TRL weights hinge's losses in place, which its backward refuses
    ),
    {"loss_type": ["discopop"], "discopop_tau": 0.3, "beta": 0.3},
    {"loss_type": ["aot"], "label_smoothing": 0.2, "beta": 0.5},
    {"loss_type": ["aot_unpaired"], "label_smoothing": 0.2, "beta": 0.5},
    {"loss_type": ["sigmoid", "bco_pair", "apo_down"], "loss_weights": [0.8, 0.2, 1.5], "beta": 0.4},
    {"loss_type": ["sigmoid", "ipo"], "f_divergence": "js", "ld_alpha": 0.5, "wpo_weighting": True},
]


@pytest.mark.peer
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_equal_to_trl_dpo(options):
    """Every loss with a reference, every option that TRL has for it, and sums of losses."""
    flags, pairs = PairLossFlags(**options), Pairs()
    agree(here(pairs, flags), in_trl(pairs, flags, flags.loss_type))


@pytest.mark.peer
@pytest.mark.parametrize("f_divergence", ["reverse_kl", "js"])
def test_length_normalised_dpo_equal_to_trl(f_divergence):
    """TRL has it as a loss of its own, sigmoid_norm."""
    flags, pairs = PairLossFlags(length_normalize=True, beta=2.0, f_divergence=f_divergence), Pairs()
    agree(here(pairs, flags), in_trl(pairs, flags, ["sigmoid_norm"]))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "label_smoothing"),
    [("cpo", 0.0), ("cpo", 0.2), ("simpo", 0.0), ("simpo", 0.2), ("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0),
     ("ipo", 0.0)],
)  # fmt: skip
def test_equal_to_trl_cpo(name, label_smoothing):
    """CPO and SimPO, and what else TRL's CPO trainer has: DPO's losses without a reference."""
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    trl_name = "sigmoid" if name == "cpo" else name
    options = {"beta": 2.0, "label_smoothing": label_smoothing, "reference_free": name in WITH_REFERENCE}
    options |= {"simpo_gamma": 1.5} if name == "simpo" else {}
    flags, pairs = PairLossFlags(loss_type=name, **options), Pairs()
    trainer = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type=trl_name, simpo_gamma=1.5, label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    sums, lengths = pairs.forest.per_branch(pairs.token_logps), pairs.forest.target_mask.sum(1)
    theirs, *rewards = CPOTrainer.cpo_loss(trainer, *halves(sums / lengths if name in ("simpo", "ipo") else sums))
    agree(here(pairs, flags), value_and_gradient(theirs.mean(), pairs.token_logps))
    if name != "ipo":
        for ours, their in zip(halves(pairwise.pair_rewards(flags, pairs.logps(flags))), rewards, strict=True):
            torch.testing.assert_close(ours, their)


@pytest.mark.peer
@pytest.mark.parametrize("spread", [2.0, 0.05, 40.0])
def test_equal_to_trl_orpo(spread):
    """The odds ratio of likely and of unlikely responses; TRL's beta is lambda."""
    pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOTrainer

    flags, pairs = PairLossFlags(loss_type="orpo", orpo_lambda=0.7), Pairs(spread=spread)
    means = pairs.forest.per_branch(pairs.token_logps) / pairs.forest.target_mask.sum(1)
    trainer = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    theirs, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *halves(means))
    agree(here(pairs, flags), value_and_gradient(-theirs.mean(), pairs.token_logps))
    for ours, their in zip(halves(pairwise.pair_rewards(flags, pairs.logps(flags))), rewards, strict=True):
        torch.testing.assert_close(ours, their)


# ------------------------------------------------------------------------------------------------------ by itself


def test_prompts_are_in_the_path_alone():
    """ORPO: with the prompts as targets, sums and lengths of responses stay what they are without."""
    flags = PairLossFlags(loss_type=["sigmoid", "orpo"])
    plain, full = Pairs(), Pairs(prompt_targets=True)
    on_response = ~full.forest.target_in_root
    assert int((~on_response).sum()) == sum(2 + i - 1 for i in range(3))
    with torch.no_grad():
        full.token_logps[on_response], full.ref_logps[on_response] = plain.token_logps, plain.ref_logps
    one, other = plain.logps(flags), full.logps(flags)
    for field in ("policy", "reference", "policy_sums", "ref_sums", "lengths", "kl"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field))
    torch.testing.assert_close(pairwise.chosen_nll(one), pairwise.chosen_nll(other))
    prompts = torch.stack([full.token_logps[~on_response][at].sum() for at in ([0], [1, 2], [3, 4, 5])])
    torch.testing.assert_close(pairwise.path_nll(other), pairwise.chosen_nll(one) - prompts)
    assert halves(other.path_lengths)[0].tolist() == [6 + 1, 2 + 2, 3 + 3]


def test_length_normalised_losses_look_at_means():
    """Every loss that takes --length_normalize: as if each response had one token of its mean log-probability."""
    for name in USED_BY["length_normalize"]:
        pairs, needs = Pairs(), NEEDS.get(name, {})
        normal, plain = (
            PairLossFlags(loss_type=name, length_normalize=True, **needs),
            PairLossFlags(loss_type=name, **needs),
        )
        found = pairs.logps(normal)
        means = found._replace(policy=found.policy / found.lengths, reference=found.reference / found.lengths)
        torch.testing.assert_close(pair_losses(normal, found), pair_losses(plain, means))
        assert not torch.allclose(pair_losses(normal, found), pair_losses(plain, found))


@pytest.mark.parametrize("name", pairwise.SORTED)
def test_c3_partners_of_the_whole_are_independent_of_the_cut(name):
    """C3: with the partners of all pairs, pair by pair gives the gradient of all at once; without them it doesn't."""
    flags, pairs = PairLossFlags(loss_type=name, beta=0.7), Pairs()
    logps = pairs.logps(flags)
    whole = value_and_gradient(pair_losses(flags, logps).sum(), pairs.token_logps)
    partners = match_sides(sides(flags, logps))

    def alone(i: int, known: bool) -> Tensor:
        logps = pairs.logps(flags)
        part = pairwise.PairLogps(*(x[2 * i : 2 * i + 2] for x in logps[:-1]), logps.weights[i : i + 1])
        mine = pairwise.Partners(*(x[i : i + 1] for x in partners)) if known else None
        return pair_losses(flags, part, mine).sum()

    cut, apart = (value_and_gradient(sum(alone(i, k) for i in range(3)), pairs.token_logps) for k in (True, False))
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(cut[1], whole[1])
    assert not torch.allclose(apart[1], whole[1])


def test_weights_multiply_losses_and_likelihoods():
    """CPO's likelihood and ORPO's carry their loss's weight; --sft_coef adds to CPO's."""
    flags = PairLossFlags(loss_type=["cpo", "orpo"], loss_weights=[2.0, 3.0], cpo_alpha=0.5, sft_coef=0.25)
    assert (flags.chosen_nll_coef, flags.path_nll_coef) == (2 * 0.5 + 0.25, 3.0)
    assert not flags.uses_reference
    assert PairLossFlags().chosen_nll_coef == PairLossFlags(loss_type="simpo").path_nll_coef == 0


# ---------------------------------------------------------------------------------------------------------- flags

OTHER = {
    "beta": 0.2,
    "label_smoothing": 0.1,
    "f_divergence": "js",
    "length_normalize": True,
    "ld_alpha": 0.5,
    "discopop_tau": 0.1,
    "cpo_alpha": 0.5,
    "simpo_gamma": 1.0,
    "orpo_lambda": 0.2,
    "reference": "models/other",
    "reference_free": True,
    "ref_update_interval": 5,
    "max_chosen_drop": 2.0,
}


@pytest.mark.parametrize("option", USED_BY)
def test_an_option_that_no_chosen_loss_uses_is_refused_by_name(option):
    """With each loss alone: taken if it is in the table, refused if not; beside one that uses it, it is taken."""
    for name in LOSS_TYPES:
        options = {**NEEDS.get(name, {}), option: OTHER[option]}
        if name in USED_BY[option]:
            assert getattr(PairLossFlags(loss_type=name, **options), option) == OTHER[option]
        elif option not in NEEDS.get(name, {}):
            with pytest.raises(UserError, match=rf"^--{option} has no meaning with --loss_type {name}; it is for "):
                PairLossFlags(loss_type=name, **options)


def test_every_loss_is_used_in_the_flags_and_has_its_options():
    assert set(LOSS_TYPES) == {*WITH_REFERENCE, *REFERENCE_FREE}
    assert all(set(losses) <= set(LOSS_TYPES) for losses in USED_BY.values())
    for name in LOSS_TYPES:
        flags, pairs = PairLossFlags(loss_type=name, **NEEDS.get(name, {})), Pairs()
        assert pair_losses(flags, pairs.logps(flags)).shape == (3,)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": ["sigmoid", "dpo"]}, "--loss_type sigmoid dpo: dpo is none of sigmoid, robust"),
        ({"loss_type": []}, "--loss_type : nothing is none of"),
        ({"loss_type": ["ipo", "ipo"]}, "--loss_type ipo ipo names a loss twice"),
        ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, "--loss_weights needs one weight for each of"),
        ({"loss_weights": [0.0]}, "--loss_weights=0.0 must be above 0"),
        ({"loss_type": ["sigmoid", "nca_pair"], "f_divergence": "js"}, "not for nca_pair"),
        ({"f_divergence_alpha": 0.2}, "--f_divergence_alpha is the order of --f_divergence=alpha"),
        ({"loss_type": ["aot"], "wpo_weighting": True}, "--wpo_weighting weights a pair"),
        ({"label_smoothing": 0.5}, r"--label_smoothing=0.5 must be in \[0, 0.5\)"),
        ({"loss_type": ["exo_pair"]}, "exo_pair needs a --label_smoothing above 0"),
        ({"ld_alpha": 1.5}, r"--ld_alpha=1.5 must be in \[0, 1\]"),
        ({"loss_type": "discopop", "discopop_tau": 1.0}, "--discopop_tau=1.0 must be in"),
        ({"beta": 0.0}, "--beta=0.0 must be above 0"),
        ({"reference_free": True, "reference": "m"}, "--reference and --reference_free contradict"),
        ({"reference_free": True, "ref_update_interval": 3}, "--ref_update_interval and --reference_free contradict"),
        ({"reference_free": True, "max_chosen_drop": 3.0}, "--max_chosen_drop and --reference_free contradict"),
        ({"ref_mixup": 0.5}, "--ref_mixup needs --ref_update_interval"),
        ({"ref_update_interval": 0}, "--ref_update_interval=0 must be above 0"),
        ({"ref_update_interval": 3, "ref_mixup": 0.0}, r"--ref_mixup=0.0 must be in \(0, 1\]"),
        ({"ref_update_interval": 3, "finetune_mode": "lora"}, "take --finetune_mode=all or last_layer"),
    ],
)
def test_contradictions_end_in_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        DPOFlags(data_dir="d", **options)


def test_lists_on_the_command_line():
    argv = "--data_dir=d --loss_type sigmoid bco_pair --loss_weights 0.8 0.2 --sft_coef=1"
    assert parse(DPOFlags, argv.split()).weights == {"sigmoid": 0.8, "bco_pair": 0.2}
    assert parse(DPOFlags, ["--data_dir=d", "--loss_type=ipo"]).loss_type == ["ipo"]
