"""The four roles of PPO: what each starts as, what they read, and what they share."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.data.text import encode_pair
from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.forward import unwrapped
from rlhf.models.loading import load_policy, load_scorer, save_model
from rlhf.models.roles import Roles, load_roles
from rlhf.rewards.models import RewardModel
from rlhf.rlhf_ppo import main
from rlhf.trees.forest import Forest, Tree
from tests.ppo import flags_of, make_world, set_up
from tests.splits import tokenizer_for
from tests.tiny import make_model
from tests.tiny_tokenizers import make_tokenizer

NO_DROPOUT = ModelFlags(disable_dropout=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    """Folders of an SFT adapter and of a reward model's adapter, both trained a little, on one base."""
    folder, lora = tmp_path_factory.mktemp("adapters"), ModelFlags(finetune_mode="lora", lora_rank=4)
    policy, scorer = load_policy(world.sft, lora), load_scorer(world.sft, lora, new_head=True)
    generator = torch.Generator().manual_seed(3)
    for role, name in ((policy, "sft"), (scorer, "rm")):
        with torch.no_grad():
            for parameter in role.own_parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        save_model(role, tokenizer_for(), folder / name)
    return folder


def lora_roles(sft: str, rm: str, critic_init: str = "reward") -> Roles:
    return load_roles(sft, rm, critic_init, ModelFlags(finetune_mode="lora", lora_rank=4, disable_dropout=True))


def forest_of(prompt=(5, 9, 11), responses=((7, 8, 6), (12,))) -> Forest:
    return Forest([Tree.of(torch.tensor(prompt), *map(torch.tensor, responses))])


@torch.no_grad()
def outputs(roles: Roles, name: str, forest: Forest) -> torch.Tensor:
    role = getattr(roles, name)
    if name in ("actor", "reference"):
        return role(forest, temperature=0.7)[0]
    return role(forest, torch.arange(forest.num_tokens))


def test_dropout_is_off_in_all_four_roles(world):
    """P4: two train() forwards are bit-equal though the models ask for dropout 0.1; without PPO's care they are not."""
    forest = forest_of()
    roles = load_roles(world.sft, world.rm, "reward", NO_DROPOUT)
    for name in ("actor", "reference", "critic", "reward"):
        getattr(roles, name).train()
        assert torch.equal(outputs(roles, name, forest), outputs(roles, name, forest)), name
    careless = load_policy(world.sft, ModelFlags()).train()
    with torch.no_grad():
        assert not torch.equal(careless(forest)[0], careless(forest)[0])


@pytest.mark.parametrize("whole_reward_model", [False, True])
def test_dropout_is_off_in_shared_roles(world, adapters, whole_reward_model):
    """P4: the same with adapters over one base, and over a reward model's of its own."""
    forest = forest_of()
    roles = lora_roles(str(adapters / "sft"), world.rm if whole_reward_model else str(adapters / "rm"))
    for name in ("actor", "reference", "critic", "reward"):
        getattr(roles, name).train()
        assert torch.equal(outputs(roles, name, forest), outputs(roles, name, forest)), name


def test_critic_starts_as_the_normalised_reward(world):
    """P2: the value at the last token of a response is its normalised score."""
    forest, roles = forest_of(), load_roles(world.sft, world.rm, "reward", NO_DROPOUT)
    reward = RewardModel(roles.reward, tokenizer_for(), tokenizer_for())
    scores = reward([torch.tensor([5, 9, 11])] * 2, [torch.tensor([7, 8, 6]), torch.tensor([12])], [True, True])
    with torch.no_grad():
        values = roles.critic(forest, forest.branch_last)
        raw = roles.reward(forest, forest.branch_last)
    torch.testing.assert_close(values, scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, (raw - 0.3) / 1.7, atol=1e-5, rtol=1e-5)


def test_critic_starts_at_the_weight_of_the_reward_model(world):
    """P2: a reward model that counts half starts a critic of half its normalised score."""
    forest, roles = forest_of(), load_roles(world.sft, world.rm, "reward", NO_DROPOUT, reward_weight=0.5)
    with torch.no_grad():
        values = roles.critic(forest, forest.branch_last)
        raw = roles.reward(forest, forest.branch_last)
    torch.testing.assert_close(values, 0.5 * (raw - 0.3) / 1.7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["all", "lora"])
def test_roles_without_a_reward_model(world, mode):
    """Three roles are left, and a critic that would start as the fourth is refused."""
    flags = ModelFlags(finetune_mode=mode, lora_rank=4 if mode == "lora" else None)
    roles = load_roles(world.sft, None, "zero", flags)
    assert roles.reward is None
    assert roles.sharing == ("three models, one for each role" if mode == "all" else "three roles on 1 copy")
    assert not outputs(roles, "critic", forest_of()).any()
    with pytest.raises(UserError, match=r"--critic_init=reward .* there is none among the rewards"):
        load_roles(world.sft, None, "reward", flags)


def test_critic_starts_as_zero_or_from_sft(world):
    """P2: a head of zeros gives V = 0 everywhere; from SFT the trunk is the policy's and the head is not zero."""
    forest = forest_of()
    zero = load_roles(world.sft, world.rm, "zero", NO_DROPOUT)
    assert not outputs(zero, "critic", forest).any()
    sft = load_roles(world.sft, world.rm, "sft", NO_DROPOUT)
    assert outputs(sft, "critic", forest).abs().min() > 0
    for roles in (zero, sft):
        trunk = unwrapped(roles.actor.model).model.state_dict()
        for name, value in unwrapped(roles.critic.model).model.state_dict().items():
            assert torch.equal(value, trunk[name])


@pytest.mark.parametrize("critic_init", ["reward", "sft", "zero"])
def test_every_critic_is_trained_and_saved_with_its_head(world, adapters, critic_init):
    """C15, P2: the head of the critic is among what it trains and saves, once, in separate and in shared roles."""
    for roles in (
        load_roles(world.sft, world.rm, critic_init, NO_DROPOUT),
        lora_roles(str(adapters / "sft"), str(adapters / "rm"), critic_init),
    ):
        own = roles.critic.own_parameters()
        assert any(p is roles.critic.head.weight for p in own.values())
        assert any(p is roles.critic.head.bias for p in own.values())
        assert not {id(p) for p in own.values()} & {id(p) for p in roles.actor.own_parameters().values()}


def test_scores_and_values_depend_on_the_query(world):
    """A1: another query, same response: another score and another value at every response token."""
    roles = load_roles(world.sft, world.rm, "reward", NO_DROPOUT)
    reward = RewardModel(roles.reward, tokenizer_for(), tokenizer_for())
    queries, response = [torch.tensor([5, 9, 11]), torch.tensor([5, 10, 11])], torch.tensor([7, 8, 6])
    one, other = (reward([query], [response], [True]) for query in queries)
    assert (one - other).abs() > 1e-3
    values = [outputs(roles, "critic", forest_of(query.tolist(), [response.tolist()]))[3:] for query in queries]
    assert ((values[0] - values[1]).abs() > 1e-3).all()


@pytest.fixture(scope="module")
def other_rm(tmp_path_factory):
    """A reward model with a smaller vocabulary and a BOS of its own."""
    tokenizer, folder = make_tokenizer(bos=True, pad_is_eos=False, vocab_size=300), tmp_path_factory.mktemp("rm")
    model = make_model("phi", scorer=True, seed=2, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer


def test_a_reward_model_with_another_tokenizer_scores_the_text(world, other_rm):
    """C7: the score is that of the text in the reward model's own tokens, by transformers alone, to 1e-5."""
    folder, tokenizer = other_rm
    mine, plain = tokenizer_for(), AutoModelForSequenceClassification.from_pretrained(folder)
    reward = RewardModel(load_scorer(folder, NO_DROPOUT, trainable=False), tokenizer, mine)
    rows = [
        ("\n\nHuman: Why?\n\nAssistant:", " Because.", True),
        ("\n\nHuman: And now?\n\nAssistant:", " Wait for", False),
    ]
    pairs = [encode_pair(mine, prompt, response, ended=ended) for prompt, response, ended in rows]
    prompts, responses = ([torch.tensor(pair[k]) for pair in pairs] for k in (0, 1))
    scores = reward(prompts, responses, [ended for _, _, ended in rows])
    for score, (prompt, response, ended) in zip(scores, rows, strict=True):
        prompt_ids, response_ids = encode_pair(tokenizer, prompt, response, ended=ended)
        ids = torch.tensor([prompt_ids + response_ids])
        with torch.no_grad():
            assert score.item() == pytest.approx(plain(ids).logits.item(), abs=1e-5)
    assert not reward.same_tokenizer


def test_control_tokens_of_the_policy_do_not_reach_another_tokenizer(world, other_rm):
    """C8, C7: prompts with a BOS and responses with an EOS of another spelling: the reward model reads the text
    between one BOS and one EOS of its own, a response that was cut without the EOS."""
    folder, tokenizer = other_rm
    mine = make_tokenizer(bos=False, pad_is_eos=True)
    mine.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    reward = RewardModel(load_scorer(folder, NO_DROPOUT, trainable=False), tokenizer, mine)
    prompt, response = ([mine.bos_token_id, *mine("Why?").input_ids], [*mine(" Because.").input_ids, mine.eos_token_id])
    for ended in (True, False):
        ids = torch.tensor(response if ended else response[:-1])
        tree = reward.tree(torch.tensor(prompt), ids, ended)
        text = tokenizer.decode(torch.cat(list(tree.segments)))
        assert text == f"{tokenizer.bos_token}Why? Because.{tokenizer.eos_token if ended else ''}"


def test_a_critic_cannot_start_as_a_model_with_another_tokenizer(world, other_rm, tmp_path):
    """C7: it would read the policy's tokens; the run stops at its start and names both, before it writes anything."""
    folder, _ = other_rm
    with pytest.raises(UserError, match="have different tokenizers") as refused:
        main(flags_of(world, tmp_path / "run", rm_experiment_dir=folder))
    assert folder in str(refused.value)
    assert world.sft in str(refused.value)
    assert not (tmp_path / "run").exists()


def base_weights(roles: Roles) -> int:
    """Bytes of all distinct weights of the four roles, adapters and scalar heads left out."""
    parts = (roles.actor, roles.reference, roles.critic, roles.reward)
    found = {
        p.data_ptr(): p.numel()
        for role in parts
        for name, p in role.named_parameters()
        if "lora_" not in name and "score" not in name and "head." not in name.replace("lm_head.", "")
    }
    return sum(found.values())


@pytest.mark.parametrize("critic_init", ["reward", "sft", "zero"])
@pytest.mark.parametrize("from_adapter", [True, False])
def test_four_adapters_share_one_base(world, adapters, critic_init, from_adapter):
    """With LoRA and a reward model that is an adapter of the same base, one copy of the base is in memory, and each
    role gives what it gives alone; the critic from the reward model at its normalised score (P2), the reference the
    SFT adapter's, not the raw base's (C14).
    """
    sft, rm, forest = str(adapters / "sft") if from_adapter else world.sft, str(adapters / "rm"), forest_of()
    roles = lora_roles(sft, rm, critic_init)
    assert base_weights(roles) == sum(p.numel() for p in load_policy(world.sft, NO_DROPOUT).parameters())
    assert roles.sharing == "four roles on 1 copy"
    alone = load_policy(sft, NO_DROPOUT, trainable=False)
    scorer = load_scorer(rm, NO_DROPOUT, trainable=False)
    with torch.no_grad():
        expected = alone(forest, temperature=0.7)[0]
        scores = scorer(forest, torch.arange(forest.num_tokens))
    for name in ("actor", "reference"):
        torch.testing.assert_close(outputs(roles, name, forest), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs(roles, "reward", forest), scores, atol=1e-5, rtol=1e-5)
    values = outputs(roles, "critic", forest)
    if critic_init == "reward":
        normal = (scores - scorer.reward_mean) / scorer.reward_scale
        torch.testing.assert_close(values, normal, atol=1e-5, rtol=1e-5)
    else:
        assert (values == 0).all() == (critic_init == "zero")


def test_a_whole_reward_model_shares_its_base_with_the_critic(world, adapters):
    """With LoRA and a reward model of its own, there are two copies: policy's and reward model's."""
    roles, forest = lora_roles(str(adapters / "sft"), world.rm), forest_of()
    assert roles.sharing == "four roles on 2 copies"
    expected = load_scorer(world.rm, NO_DROPOUT, trainable=False)
    with torch.no_grad():
        scores = expected(forest, torch.arange(forest.num_tokens))
    torch.testing.assert_close(outputs(roles, "reward", forest), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs(roles, "critic", forest), (scores - 0.3) / 1.7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rm", ["adapter", "whole"])
def test_an_update_moves_one_role(world, adapters, rm):
    """With LoRA, an update of the actor leaves reference, reward and critic bit-equal; so does one of the critic."""
    roles = lora_roles(str(adapters / "sft"), str(adapters / "rm") if rm == "adapter" else world.rm)
    forest, names = forest_of(), ("actor", "reference", "critic", "reward")
    for updated in ("actor", "critic"):
        role, before = getattr(roles, updated), {name: outputs(roles, name, forest) for name in names}
        optimizer = torch.optim.SGD(role.own_parameters().values(), lr=0.1)
        result = role(forest)[0] if updated == "actor" else role(forest, forest.branch_last)
        result.sum().backward()
        optimizer.step()
        for other in (roles.actor, roles.critic):
            other.zero_grad()
        for name in names:
            same = torch.equal(before[name], outputs(roles, name, forest))
            assert same == (name != updated), (name, updated)


def test_set_up_names_the_flag_of_a_missing_model(world, tmp_path):
    """A reward model that is not there ends in one sentence that names its flag."""
    with pytest.raises(UserError, match="--rm_experiment_dir"):
        main(flags_of(world, tmp_path / "run", rm_experiment_dir=None))
    assert set_up(flags_of(world, tmp_path / "run")).roles.sharing == "four models, one for each role"
