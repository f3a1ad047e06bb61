"""The tree forward against the plain one, architecture by architecture, in values and in gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models import products, trained
from rlhf.models.forward import enable_checkpointing, packed_states
from rlhf.models.policy import Policy, Scorer
from rlhf.models.probe import tree_attention_fault
from rlhf.trees import masks
from rlhf.trees.forest import Forest, Tree
from tests.plain import eager, padded, plain_logps
from tests.tiny import make_model
from tests.trees import VOCABULARY, random_tree

TREES = """
    llama qwen2 qwen3 gpt2 opt gpt_neox phi phi3 olmo2 mistral gemma2 gemma3_text granite cohere
""".split()  # noqa: SIM905
FALLBACK = ["gptj", "bloom", "gpt_neo", "falcon", "gpt_oss"]


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def branched() -> list[Tree]:
    """0 to 5 branches on a trunk, longer than the windows of 5; an empty prompt; empty and one-token segments."""
    trees = [Tree.of(ids(7 - n, n), *(ids(3 + 2 * b, 10 * n + b) for b in range(n))) for n in range(6)]
    return [*trees, Tree.of(ids(0, 1), ids(3, 2), ids(8, 3)), Tree.of(ids(1, 4), ids(1, 5), ids(0, 6), ids(9, 7))]


def deep() -> list[Tree]:
    generator = torch.Generator().manual_seed(3)
    return [random_tree(generator, max_depth=4, trunk=1) for _ in range(3)]


FORESTS = {"branched": branched(), "deep": deep()}


def policy_of(architecture: str, **options) -> Policy:
    model = make_model(architecture, **options)
    return Policy(model, uses_trees=tree_attention_fault(model) is None)


def weighted(per_path: list[Tensor]) -> Tensor:
    """A sum in which every log-probability has a weight of its own."""
    generator = torch.Generator().manual_seed(5)
    return sum((x * torch.randn(len(x), generator=generator)).sum() for x in per_path)


def per_path(forest: Forest, per_target: Tensor) -> list[Tensor]:
    return [row[mask] for row, mask in zip(forest.dense(per_target), forest.target_mask, strict=True)]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-4) -> None:
    """Each parameter's gradient to `relative` of its norm; where that is nothing but rounding, of the whole's."""
    assert found.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert whole > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= relative * gradient.norm() + 1e-3 * relative * whole, name


@pytest.mark.parametrize("whole_tree_tokens", [512, 3], ids=["small", "large"])
@pytest.mark.parametrize("shape", FORESTS)
@pytest.mark.parametrize("architecture", [*TREES, *FALLBACK])
def test_c5_tree_forward_is_the_plain_forward(monkeypatch, architecture, shape, whole_tree_tokens):
    """C5: log-probabilities of every path to 1e-5, gradients of every parameter to 1e-4 of their size, in float32.

    Small trees are one masked block, large ones a block for each segment. Mistral's and Gemma's windows of 5 are
    shorter than the paths. GPT-J, BLOOM and other models that take no
    attention function, or add sinks to it, run on padded rows behind the same interface.
    """
    monkeypatch.setattr(masks, "WHOLE_TREE_TOKENS", whole_tree_tokens)
    policy, plain, trees = policy_of(architecture), eager(architecture), FORESTS[shape]
    assert policy.uses_trees == (architecture in TREES)
    forest = Forest(trees)
    found = per_path(forest, policy(forest)[0])
    expected = [logps for logps, _ in plain_logps(plain, trees)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    weighted(found).backward()
    weighted(expected).backward()
    assert_close_gradients(gradients(policy.model), gradients(plain))


def beside_of(trees: list[Tree]) -> list[Tree]:
    """Other branches on the same roots: one of 6 tokens for each, and a second, forked one for every other tree."""
    found = []
    for n, tree in enumerate(trees):
        segments, parents = [tree.segments[0], ids(6, 50 + n)], [-1, 0]
        if n % 2:
            segments, parents = [*segments, ids(2, 60 + n), ids(3, 70 + n), ids(1, 80 + n)], [-1, 0, 0, 2, 2]
        found.append(Tree(segments, parents))
    return found


@pytest.mark.parametrize("shape", FORESTS)
@pytest.mark.parametrize("architecture", [*TREES, "gptj", "bloom"])
def test_branches_beside_are_those_of_a_pass_of_their_own(architecture, shape):
    """Values as in a forest of their own to 1e-5, no gradient through them, and the others' gradient unchanged."""
    policy = policy_of(architecture)
    forest, beside = Forest(FORESTS[shape]), Forest(beside_of(FORESTS[shape]))
    logps, entropies = policy(forest, beside=beside, entropy=True)
    own, other = logps.split([forest.num_targets, beside.num_targets])
    with torch.no_grad():
        expected, expected_entropies = policy(beside, entropy=True)
    torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies[forest.num_targets :], expected_entropies, rtol=0, atol=1e-5)
    (weighted(per_path(forest, own)) + other.sum()).backward()
    found = gradients(policy.model)
    policy.zero_grad()
    weighted(per_path(forest, policy(forest)[0])).backward()
    assert_close_gradients(found, gradients(policy.model), relative=1e-6)


def test_branches_beside_run_no_prompt_again():
    """A prompt of 6 with a branch of 3, and beside it one of 4: 9 rows of every linear layer, then 4; also where the
    backward pass computes the first 9 again. Prompts of other lengths are refused."""
    forest, beside = Forest([Tree.of(ids(6, 0), ids(3, 1))]), Forest([Tree.of(ids(6, 0), ids(4, 2))])
    for checkpointing, again in ((False, []), (True, [9])):
        policy, seen = policy_of("phi"), []
        policy.train()
        if checkpointing:
            enable_checkpointing(policy.model)
        policy.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(len(args[0][0]))
        )
        policy(forest, beside=beside)[0].sum().backward()
        assert seen == [9, 4, *again]
    with pytest.raises(ValueError, match="same roots"):
        policy(forest, beside=Forest([Tree.of(ids(5, 0), ids(4, 2))]))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "cohere", "gptj"])
def test_p5_temperature_and_entropy_are_of_the_full_logits(architecture):
    """P5: logits are divided by the temperature after the model's own cap and scale; entropies likewise."""
    policy, trees = policy_of(architecture), branched()
    forest = Forest(trees)
    with torch.no_grad():
        logps, entropies = policy(forest, temperature=0.7, entropy=True)
        expected = plain_logps(eager(architecture), trees, temperature=0.7)
    for mine, (theirs, _) in zip(per_path(forest, logps), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    for mine, (_, theirs) in zip(per_path(forest, entropies), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gptj"])
def test_c5_a_sample_changes_no_other_sample(architecture):
    """C5: every log-probability packed with others is that of its tree alone; and another tree changes nothing."""
    policy, trees = policy_of(architecture), branched()

    def logps(trees: list[Tree]) -> list[Tensor]:
        forest = Forest(trees)
        with torch.no_grad():
            return per_path(forest, policy(forest)[0])

    packed = logps(trees)
    for mine, theirs in zip(packed, [row for tree in trees for row in logps([tree])], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    changed = logps([*trees[:3], Tree.of(ids(7 - 3, 77), *(ids(3 + 2 * b, 78 + b) for b in range(3))), *trees[4:]])
    first, last = (
        sum(len(tree.segments) - 1 or 1 for tree in trees[:3]),
        sum(len(tree.segments) - 1 or 1 for tree in trees[:4]),
    )
    for i, (mine, theirs) in enumerate(zip(packed, changed, strict=True)):
        if first <= i < last:
            assert (mine - theirs).abs().max() > 1e-2
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pads", [0, 1, 7])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_c13_a2_a3_no_padding_shifts_a_log_probability(architecture, pads):
    """C13, A3: ours, without padding, equal the plain model's on left-padded rows with positions from the mask.

    A2: under the pads stand random ids. GPT-2 and OPT have absolute positions, Llama rotary ones.
    """
    policy = policy_of(architecture)
    trees = [Tree.of(ids(1 + n, n), ids(6 - n, 20 + n)) for n in range(4)]
    forest = Forest(trees)
    with torch.no_grad():
        found = per_path(forest, policy(forest)[0])
        expected = plain_logps(eager(architecture), trees, left=pads)
    for mine, (theirs, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pads", [None, 0, 1, 7], ids=["right", "left", "left1", "left7"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj"])
def test_c6_c13_a7_scores_do_not_depend_on_the_layout(architecture, pads):
    """C6, A7, C13: a score is the same packed, alone, and in a right- or left-padded batch of the plain classifier.

    EOS tokens (2) stand inside one prompt, one row has none at all, and one ends in two. R1, A1: the score is read
    at the response's own last token, and a change of the prompt alone changes it.
    """
    trees = [
        Tree.of(torch.tensor([5, 2, 9, 2]), torch.tensor([7, 8, 2])),
        Tree.of(torch.tensor([6, 3]), torch.tensor([7, 8, 11, 12])),
        Tree.of(torch.tensor([4, 9, 2]), torch.tensor([10, 2, 2]), torch.tensor([2])),
    ]
    model = make_model(architecture, scorer=True)
    scorer = Scorer(model, model.score, uses_trees=tree_attention_fault(model) is None)

    def scores(trees: list[Tree]) -> Tensor:
        forest = Forest(trees)
        with torch.no_grad():
            return scorer(forest, forest.branch_last)

    packed = scores(trees)
    alone = torch.cat([scores([tree]) for tree in trees])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    plain = eager(architecture, scorer=True)
    rows = [torch.cat([t.segments[0], branch]) for t in trees for branch in t.segments[1:]]
    inputs = padded(rows, left=pads)
    with torch.no_grad():
        states = plain.base_model(**inputs, use_cache=False).last_hidden_state
    last = torch.tensor([len(row) - 1 if pads is None else states.shape[1] - 1 for row in rows])
    expected = plain.score(states[range(len(rows)), last]).squeeze(-1)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-4)
    other_prompt = scores([Tree.of(torch.tensor([5, 2, 9, 3]), trees[0].segments[1])])
    assert (other_prompt - packed[:1]).abs() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_checkpointing_gives_the_same_gradients(architecture):
    """Activations are computed again under the plan of their own forward pass, whatever pass came after it."""
    forests = [Forest(FORESTS[shape]) for shape in FORESTS]
    found = []
    for checkpointing in (False, True):
        policy = policy_of(architecture)
        policy.train()
        if checkpointing:
            enable_checkpointing(policy.model)
        losses = [weighted(per_path(forest, policy(forest)[0])) for forest in forests]
        sum(losses).backward()
        found.append(gradients(policy.model))
    assert_close_gradients(found[1], found[0], relative=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_checkpointing_recomputes(architecture, monkeypatch):
    """Every layer's attention runs again in the backward pass; no library warns of how it was switched on."""
    policy, calls, plain = policy_of(architecture), [], products.attended
    policy.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_checkpointing(policy.model)
    for module in (products, trained):
        monkeypatch.setattr(module, "attended", lambda *args, **options: calls.append(1) or plain(*args, **options))
    policy(Forest(branched()))[0].sum().backward()
    assert len(calls) == 2 * policy.model.config.num_hidden_layers


def test_a_model_without_the_switch_is_named():
    policy = policy_of("llama")
    policy.model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="LlamaForCausalLM has no --gradient_checkpointing"):
        enable_checkpointing(policy.model)


def test_mixed_precision_stays_near_float32():
    """Under bf16 autocast masks follow the queries' type, and the results stay within bf16's rounding."""
    policy, forest = policy_of("llama"), Forest(branched())
    with torch.no_grad():
        exact, _ = policy(forest)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = policy(forest)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.3)


def test_attention_dropout_is_the_models_own():
    """In training mode attention drops what the configuration says; in evaluation nothing."""
    policy, forest = policy_of("llama", attention_dropout=0.5), Forest(branched())
    assert torch.equal(policy(forest)[0], policy(forest)[0])
    policy.train()
    assert not torch.equal(policy(forest)[0], policy(forest)[0])


def test_every_token_goes_through_the_model_once():
    """DESIGN.md section 4: a trunk of 6 with 5 branches of 3 is 21 rows of every linear layer, not 5 x 9."""
    policy, seen = policy_of("llama"), []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    packed_states(policy.model, Forest([Tree.of(ids(6, 0), *(ids(3, 1 + b) for b in range(5)))]))
    assert seen == [(1, 21)]


def test_outside_a_forest_the_model_is_an_ordinary_one():
    """The same weights still serve plain forwards and `generate`, window, cap and left padding included."""
    for architecture in ("llama", "gemma2", "mistral"):
        policy, plain = policy_of(architecture), eager(architecture)
        inputs = padded([ids(9, 1), ids(4, 2)], left=1)
        with torch.no_grad():
            real = inputs["attention_mask"].bool()
            mine, theirs = (model(**inputs, use_cache=False).logits[real] for model in (policy.model, plain))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
            options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
            batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            assert torch.equal(policy.model.generate(**batch, **options), plain.generate(**batch, **options))
