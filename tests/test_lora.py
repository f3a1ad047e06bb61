"""Adapters: what they start from, what the reference is, and that nothing is lost between runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.forward import using_adapter
from rlhf.models.loading import load_policy, load_scorer, save_model
from rlhf.models.policy import Policy, Scorer
from rlhf.rlhf_dpo import DPOFlags
from rlhf.rlhf_dpo import main as dpo
from rlhf.rollouts import Sampling, generate
from rlhf.trees.forest import Forest, Tree
from tests.splits import make_data, make_model_dir, metrics_of, quick_flags, tokenizer_for

LORA = ModelFlags(finetune_mode="lora", lora_rank=4)
FOREST = Forest(
    [Tree.of(torch.arange(5), torch.arange(7, 12), torch.arange(20, 29)), Tree.of(*torch.arange(8).split(4))]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A base, and as they come from earlier stages: a whole model, an adapter, and the adapter merged."""
    root = tmp_path_factory.mktemp("models")
    found = {
        "data": make_data(root / "data"),
        "base": make_model_dir(root / "base"),
        "gpt2": make_model_dir(root / "gpt2", "gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2),
    }
    sft = trained(load_policy(found["base"], LORA))
    save_model(sft, tokenizer_for(), root / "adapter")
    merged = load_policy(str(root / "adapter"), ModelFlags(), trainable=False)
    save_model(merged, tokenizer_for(), root / "merged")
    return {**found, "adapter": str(root / "adapter"), "merged": str(root / "merged")}


def trained(role, seed: int = 0):
    """`role` with its own parameters moved well away from where they began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.own_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return role


def output(role) -> torch.Tensor:
    """Log-probabilities or scores, with dropout off."""
    role.eval()
    with torch.no_grad():
        return role(FOREST)[0] if isinstance(role, Policy) else role(FOREST, FOREST.branch_last)


def assert_same(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_far(found: torch.Tensor, other: torch.Tensor) -> None:
    assert (found - other).abs().max() > 0.05


@pytest.mark.parametrize("source", ["base", "gpt2"])
def test_c14_a_new_adapter_changes_nothing_yet(folders, source):
    """C14: with a new adapter the policy is the base, to 1e-6; its linear layers, GPT-2's too, all have one."""
    policy = load_policy(folders[source], LORA)
    assert_same(output(policy), output(load_policy(folders[source], ModelFlags())), atol=1e-6)
    trained_names = policy.own_parameters()
    assert trained_names
    assert all("lora_" in name for name in trained_names)
    layers = {name.split(".lora_")[0] for name in trained_names}
    assert len(layers) == 2 * (7 if source == "base" else 4)


@pytest.mark.parametrize("source", ["base", "adapter", "merged", "gpt2"])
@pytest.mark.parametrize("mode", ["all", "lora"])
def test_c14_c5_at_step_0_the_policy_is_the_reference(folders, tmp_path, capsys, source, mode):
    """C14: whole model, new adapter, continued adapter, adapter on a merged SFT: equal to 1e-6; the log says to what.

    C5: so the loss of the first step is ln 2, packed.
    """
    flags = quick_flags(
        DPOFlags, folders["data"], tmp_path, model_name=folders[source], finetune_mode=mode, disable_dropout=True,
        eval_interval=1, max_steps=1,
    )  # fmt: skip
    dpo(flags)
    val, train, _ = metrics_of(tmp_path)
    for line, prefix in ((val, "val"), (train, "train")):
        assert line[f"{prefix}/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert line[f"{prefix}/chosen_logp_change_per_token"] == pytest.approx(0, abs=1e-6)
        assert line[f"{prefix}/rejected_logp_change_per_token"] == pytest.approx(0, abs=1e-6)
    assert val["val/kl_k3_per_token"] == pytest.approx(0, abs=1e-6)
    assert f"the reference is {folders[source]}, the policy as this run starts" in capsys.readouterr().out


def test_c14_the_reference_of_a_continued_adapter_is_not_the_base(folders):
    """C14: the policy goes on from the SFT adapter, whose numbers are far from the raw base's; its frozen copy is
    named "reference" and stays while the policy moves."""
    policy = load_policy(folders["adapter"], LORA)
    start, merged = output(policy), output(load_policy(folders["merged"], ModelFlags()))
    assert_same(start, merged)
    assert_far(start, output(load_policy(folders["base"], ModelFlags())))
    reference = Policy(policy.model, uses_trees=True, adapter="reference")
    assert_same(output(reference), merged)
    assert all(".default." in name for name in policy.own_parameters())
    trained(policy)
    assert_far(output(policy), start)
    assert_same(output(reference), merged)


def test_roles_on_one_base_do_not_touch_each_other(folders):
    """Running one adapter leaves the others' choice and `requires_grad` alone, also after an error."""
    policy = load_policy(folders["adapter"], LORA)
    before = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    start = output(policy)
    base = Policy(policy.model, uses_trees=True, adapter=None)
    assert_same(output(base), output(load_policy(folders["base"], ModelFlags())))
    with pytest.raises(ZeroDivisionError), using_adapter(policy.model, None):
        raise ZeroDivisionError
    assert torch.equal(output(policy), start)
    assert {name: p.requires_grad for name, p in policy.model.named_parameters()} == before


def test_c2_samples_come_from_the_roles_own_adapter(folders):
    """C2: a policy that shares its base samples with its adapter, the reference with its own."""
    policy = trained(load_policy(folders["adapter"], LORA))
    reference = Policy(policy.model, uses_trees=True, adapter="reference")
    prompt = torch.arange(5)
    for role in (policy, reference):
        samples = generate(role, [prompt], Sampling(6, 1.3))
        forest = Forest([Tree.of(prompt, samples.response_ids[0])])
        with torch.no_grad():
            assert_same(role(forest, temperature=1.3)[0], samples.token_logps[0], atol=1e-4)


def test_a_saved_adapter_loads_with_peft_alone(folders, tmp_path):
    """`final/` of a LoRA run: peft on the base gives our numbers, and only the trained adapter is in it."""
    policy = trained(load_policy(folders["adapter"], LORA))
    save_model(policy, tokenizer_for(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    assert not (tmp_path / "reference").exists()
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    row = torch.arange(8)
    expected = output(policy)[-4:]
    for plain in (PeftModel.from_pretrained(base, tmp_path).eval(), AutoPeftModelForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            logps = plain(input_ids=row[None]).logits[0, 3:-1].log_softmax(-1)[range(4), row[4:]]
        assert_same(logps, expected)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_c15_a_reward_model_keeps_its_head(folders, tmp_path, start):
    """C15: save -> load -> score, and merge -> score, to 1e-5, ours and peft's alone; R3: from the SFT trunk."""
    scorer = load_scorer(folders[start], LORA, new_head=True)
    sft = load_policy(folders[start], ModelFlags(), trainable=False)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        states = [
            role.model.get_base_model().model(ids) if isinstance(role.model, PeftModel) else role.model.model(ids)
            for role in (scorer.eval(), sft)
        ]
    assert_same(states[0].last_hidden_state, states[1].last_hidden_state)
    trained(scorer)
    scorer.reward_mean, scorer.reward_scale = 0.5, 2.0
    expected = output(scorer)
    save_model(scorer, tokenizer_for(), tmp_path)
    merged = load_scorer(str(tmp_path), ModelFlags(), trainable=False)
    assert not isinstance(merged.model, PeftModel)
    assert_same(output(merged), expected)
    continued = load_scorer(str(tmp_path), LORA)
    assert isinstance(continued.model, PeftModel)
    assert_same(output(continued), expected)
    for again in (merged, continued):
        assert (again.reward_mean, again.reward_scale) == (0.5, 2.0)
    base = AutoModelForSequenceClassification.from_pretrained(folders["base"], num_labels=1)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert_same(plain(input_ids=torch.arange(8)[None]).logits[0], expected[-1:])
    save_model(merged, tokenizer_for(), tmp_path / "merged")
    assert_same(output(load_scorer(str(tmp_path / "merged"), ModelFlags(), trainable=False)), expected)


def test_c15_an_adapter_without_its_head_is_an_error(folders, tmp_path):
    """C15: a head that was lost, or never was, would be random: neither scores."""
    with pytest.raises(UserError, match=r"adapter of a language model.*no trained head"):
        load_scorer(folders["adapter"], ModelFlags(), trainable=False)
    save_model(trained(load_scorer(folders["base"], LORA, new_head=True)), tokenizer_for(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(path).items() if "score" not in name}, path)
    for flags, trainable in ((ModelFlags(), False), (LORA, True)):
        with pytest.raises(UserError, match="lacks its trained head"):
            load_scorer(str(tmp_path), flags, trainable=trainable)


def test_c11_an_adapter_without_weights_is_an_error(folders, tmp_path):
    """C11: loading 0 adapter tensors is no start from scratch."""
    save_model(load_policy(folders["adapter"], LORA), tokenizer_for(), tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    for load in (load_policy, lambda *args: load_scorer(*args, new_head=True)):
        with pytest.raises(UserError, match="adapter"):
            load(str(tmp_path), LORA)


def test_an_adapter_of_another_base_is_an_error(folders, tmp_path):
    save_model(load_policy(folders["gpt2"], LORA), tokenizer_for(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": folders["base"]}))
    with pytest.raises(UserError, match="adapter"):
        load_policy(str(tmp_path), LORA)


def test_settings_of_a_continued_adapter_are_its_own(folders):
    """C11: a rank that differs is refused; left out, the adapter's own is used."""
    with pytest.raises(UserError, match=r"--lora_rank=8 differs from 4 of the adapter"):
        load_policy(folders["adapter"], ModelFlags(finetune_mode="lora", lora_rank=8))
    policy = load_policy(folders["adapter"], ModelFlags(finetune_mode="lora"))
    assert policy.model.peft_config["default"].r == 4


def test_flags_reach_the_adapter(folders):
    flags = ModelFlags(finetune_mode="lora", lora_rank=3, lora_alpha=12, lora_dropout=0.25, lora_targets=["q_proj"])
    policy = load_policy(folders["base"], flags)
    settings = policy.model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 12, 0.25)
    assert all(".q_proj." in name for name in policy.own_parameters())
    assert policy.training
    assert not torch.equal(trained(policy)(FOREST)[0], policy(FOREST)[0])
    with pytest.raises(UserError, match=r"--lora_targets=\['nothing'\]"):
        load_policy(folders["base"], ModelFlags(finetune_mode="lora", lora_targets=["nothing"]))


def test_an_adapted_head_still_gives_its_own_logits(folders):
    """--lora_targets=lm_head: the chunked projection by weight alone would miss the adapter."""
    flags = ModelFlags(finetune_mode="lora", lora_targets=["q_proj", "lm_head"])
    policy = trained(load_policy(folders["base"], flags))
    row = torch.arange(8)
    with torch.no_grad():
        expected = policy.eval().model(input_ids=row[None]).logits[0, 3:-1].log_softmax(-1)[range(4), row[4:]]
    assert_same(output(policy)[-4:], expected)


def test_gradients_reach_the_adapter_and_nothing_else(folders):
    for role in (load_policy(folders["base"], LORA), load_scorer(folders["base"], LORA, new_head=True)):
        result = role(FOREST)[0] if isinstance(role, Policy) else role(FOREST, FOREST.branch_last)
        result.sum().backward()
        with_gradient = {name for name, p in role.named_parameters() if p.grad is not None}
        assert with_gradient == set(role.own_parameters())
        assert any("score" in name or "head" in name for name in with_gradient) == isinstance(role, Scorer)
