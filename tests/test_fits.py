"""Damaged models and models that do not fit: one sentence before the first step, for every script."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import rlhf_dpo, rlhf_evaluate, rlhf_grpo, rlhf_kto, rlhf_online_dpo, rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.data.prompts import load_prompts
from rlhf.data.splits import load_split, write_split
from rlhf.errors import UserError
from rlhf.experiment.fits import check_reward_model
from rlhf.flags import ModelFlags
from rlhf.models.loading import load_policy, load_scorer, save_model
from rlhf.rewards.models import RewardModel
from tests.splits import make_data, make_model_dir, quick_flags, tokenizer_for
from tests.tiny_tokenizers import make_tokenizer

SCRIPTS = {
    "sft": (rlhf_sft, rlhf_sft.SFTFlags),
    "rm": (rlhf_rm, rlhf_rm.RMFlags),
    "dpo": (rlhf_dpo, rlhf_dpo.DPOFlags),
    "kto": (rlhf_kto, rlhf_kto.KTOFlags),
    "grpo": (rlhf_grpo, rlhf_grpo.GRPOFlags),
    "online_dpo": (rlhf_online_dpo, rlhf_online_dpo.OnlineDPOFlags),
    "ppo": (rlhf_ppo, rlhf_ppo.PPOFlags),
}
SAMPLING = ("grpo", "online_dpo", "ppo")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("lab")
    return {
        "data": make_data(root / "data"),
        "model": make_model_dir(root / "model"),
        "reward": make_model_dir(root / "reward", scorer=True),
        "short": make_model_dir(root / "short", "gpt2", n_positions=16),
        "short-reward": make_model_dir(root / "short-reward", "gpt2", scorer=True, n_positions=16),
        "narrow": make_model_dir(root / "narrow", vocab_size=400),
    }


def run(name: str, lab: dict[str, str], out: Path, *, model: str = "model", **flags) -> None:
    module, flags_class = SCRIPTS[name]
    where = "model_name" if name == "sft" else "sft_experiment_dir"
    if name in SAMPLING:
        flags = {"reward": ["length:5"], "rollout_size": 4, "critic_init": "sft", **flags}
    flags = {key: value for key, value in flags.items() if key in flags_class.__dataclass_fields__}
    try:
        module.main(quick_flags(flags_class, lab["data"], out, **{where: lab[model]}, **flags))
    finally:
        assert not out.exists(), "an experiment was begun"


@pytest.mark.parametrize("name", SCRIPTS)
def test_rows_longer_than_the_models_positions(lab, tmp_path, name):
    """A model with 16 positions: the split, the first of its longest rows, its length and the flag are named."""
    stage = {"sft": "finetune", "kto": "feedback"}.get(name, "prompts" if name in SAMPLING else "preference")
    split = load_split(lab["data"], stage, "train")
    if name in SAMPLING:
        lengths, remedy = split.prompt_lens + 4, "--max_new_tokens=4 .* make --max_new_tokens smaller"
    else:
        columns = [column for column in split[0] if column.endswith("input_ids")]
        lengths, remedy = torch.stack([split.lengths(column) for column in columns]).amax(0), "--max_length=16"
    row, most = int(lengths.argmax()), int(lengths.max())
    with pytest.raises(
        UserError,
        match=rf"{stage}_train\.pt, row {row}: .* {most} tokens, .* 16 positions; .*{remedy}|"
        rf"{stage}_train\.pt, row {row}: .*{remedy}",
    ):
        run(name, lab, tmp_path / "out", model="short")


@pytest.mark.parametrize("name", SAMPLING)
def test_prompts_and_responses_longer_than_the_reward_models_positions(lab, tmp_path, name):
    """A8: the policy has room for them; the sentence names the split, the row and the reward model."""
    lengths = load_split(lab["data"], "prompts", "train").prompt_lens + 4
    where = rf"prompts_train\.pt, row {int(lengths.argmax())}: prompt and --max_new_tokens=4 are {int(lengths.max())} "
    with pytest.raises(UserError, match=rf"{where}tokens, and the reward model {lab['short-reward']} has 16 positions"):
        run(name, lab, tmp_path / "out", reward=[f"model:{lab['short-reward']}"])


def test_a_reward_model_with_another_tokenizer_and_few_positions(lab, tmp_path, capsys):
    """C7: the longest prompt, of row 1, is 57 of its tokens, of a vocabulary of little more than letters. Without room
    for a response it is refused; where one may not fit it is warned of, and the one that doesn't stops the run, by its
    row."""
    tokenizer = make_tokenizer(bos=True, pad_is_eos=False, vocab_size=300)
    prompts = load_prompts(lab["data"], "train", tokenizer_for())

    def judge(positions: int) -> RewardModel:
        folder = tmp_path / str(positions)
        make_model_dir(folder, "gpt2", scorer=True, n_positions=positions, tokenizer=tokenizer)
        return RewardModel(load_scorer(str(folder), ModelFlags(), trainable=False), tokenizer, tokenizer_for())

    where = r"prompts_train\.pt, row 1: the prompt is 57 tokens of the reward model"
    with pytest.raises(UserError, match=rf"{where}, which has 57 positions; prepare"):
        check_reward_model(prompts, judge(57), 4)
    assert re.search(
        rf"{where}, which has 60 .* of --max_new_tokens=4 may not fit", check_reward_model(prompts, judge(60), 4)
    )
    assert check_reward_model(prompts, judge(61), 4) is None
    flags = {
        "rollout_size": 14,
        "mini_batch_size": 14,
        "reward": [f"model:{tmp_path / '60'}"],
        "sft_experiment_dir": lab["model"],
    }
    with pytest.raises(
        UserError, match=r"row \d+ of .*prompts_train\.pt: prompt and response are 6\d tokens .*/60, which"
    ):
        rlhf_grpo.main(quick_flags(rlhf_grpo.GRPOFlags, lab["data"], tmp_path / "out", **flags))
    assert re.search(rf"warning: .*{where} {tmp_path}/60, which has 60", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["dpo", "kto", "online_dpo"])
def test_a_reference_that_does_not_fit(lab, tmp_path, name):
    """C7, A2: one of another tokenizer, and one with too few positions, neither of which the policy has."""
    other = make_model_dir(tmp_path / "other", tokenizer=make_tokenizer(bos=True, pad_is_eos=False))
    with pytest.raises(UserError, match=rf"the reference {other} has another tokenizer than the policy"):
        run(name, lab, tmp_path / "out", reference=other)
    with pytest.raises(UserError, match=rf"_train\.pt, row \d+: .*, and the reference {lab['short']} has 16 positions"):
        run(name, lab, tmp_path / "out", reference=lab["short"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tokenizer_with_more_tokens_than_the_embedding(lab, tmp_path, name):
    with pytest.raises(
        UserError, match=r"has the token '.*' with the id 5\d\d, and the model's embedding has 400 rows;"
    ):
        run(name, lab, tmp_path / "out", model="narrow")


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_ids_beyond_the_vocabulary(lab, tmp_path, name):
    """Of data without an args.json, which names no tokenizer; A2."""
    data = shutil.copytree(lab["data"], tmp_path / "data")
    (data / "args.json").unlink()
    stage = {"sft": "finetune", "dpo": "preference", "ppo": "prompts"}[name]
    rows = list(load_split(data, stage, "train"))
    for key, value in rows[3].items():
        if isinstance(value, torch.Tensor):
            value[0 if key != "targets" else -1] = 70_000 if key != "targets" else value[-1]
    write_split(data, stage, "train", rows)
    with pytest.raises(UserError, match=rf"{stage}_train\.pt holds the token id 70000, .* embedding has \d+ rows;"):
        run(name, {**lab, "data": str(data)}, tmp_path / "out")


def test_the_evaluation_names_the_row_that_does_not_fit(lab):
    flags = {"data_dir": lab["data"], "models": [f"a={lab['short']}"], "split": "validation", "accelerator": "cpu"}
    with pytest.raises(
        UserError, match=r"prompts_validation\.pt, row \d+: prompt and --max_new_tokens=64 .* 16 positions"
    ):
        rlhf_evaluate.main(rlhf_evaluate.EvaluateFlags(**flags))


def test_the_example_prompt_has_to_fit_too(lab, tmp_path):
    """It is answered at every evaluation, the last one included, which must not fail after all the training."""
    with pytest.raises(
        UserError, match=r"example_prompt\.pt has \d+ tokens, .* 512 positions .*--max_new_tokens smaller"
    ):
        run("sft", lab, tmp_path / "out", max_new_tokens=510)
    data = shutil.copytree(lab["data"], tmp_path / "data")
    torch.save({"input_ids": torch.tensor([[5, 9_999]])}, data / "example_prompt.pt")
    with pytest.raises(UserError, match=r"example_prompt\.pt holds the token id 9999"):
        run("sft", {**lab, "data": str(data)}, tmp_path / "out")


@pytest.mark.parametrize(
    "content", [[], {"input_ids": [1]}, {"input_ids": torch.ones(3)}, {"input_ids": torch.zeros(0).long()}]
)
def test_an_example_prompt_that_is_none(lab, tmp_path, content):
    data = shutil.copytree(lab["data"], tmp_path / "data")
    torch.save(content, data / "example_prompt.pt")
    with pytest.raises(UserError, match=r"example_prompt\.pt holds no prompt"):
        run("sft", {**lab, "data": str(data)}, tmp_path / "out")


@pytest.mark.parametrize("name", ["train", "validation"])
def test_an_empty_split(lab, tmp_path, name):
    data = shutil.copytree(lab["data"], tmp_path / "data")
    torch.save([], data / f"finetune_{name}.pt")
    with pytest.raises(UserError, match=rf"finetune_{name}\.pt holds no rows"):
        run("sft", {**lab, "data": str(data)}, tmp_path / "out")


def test_ids_that_need_more_than_32_bits_are_refused_and_not_wrapped(tmp_path):
    """2**32 + 5 would be packed as 5."""
    row = {"prompt_len": 2, "input_ids": torch.tensor([1, 2]), "reference": ""}
    for value in (2**32 + 5, 2**31, -(2**31) - 1):
        torch.save([row, {**row, "input_ids": torch.tensor([1, value])}], tmp_path / "prompts_train.pt")
        with pytest.raises(UserError, match=rf"prompts_train\.pt, row 1, 'input_ids': found the id {value}"):
            load_split(tmp_path, "prompts", "train")
    torch.save([{**row, "prompt_len": 1 << 70}], tmp_path / "prompts_train.pt")
    with pytest.raises(UserError, match="row 0, 'prompt_len': found a number that needs more than 32 bits"):
        load_split(tmp_path, "prompts", "train")
    torch.save([{**row, "reference": "\ud800"}], tmp_path / "prompts_train.pt")
    with pytest.raises(UserError, match=r"prompts_train\.pt"):
        load_split(tmp_path, "prompts", "train")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(lab, tmp_path, name, value):
    """C25: one value of one tensor is found, whichever it is."""
    for role, load in (("model", load_policy), ("reward", load_scorer)):
        folder = shutil.copytree(lab[role], tmp_path / role)
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[-1] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"{folder}: {name} holds NaN or infinite values"):
            load(str(folder), ModelFlags(), trainable=False)


def test_large_finite_weights_are_taken(lab, tmp_path):
    """Their sum overflows, and they don't."""
    folder = shutil.copytree(lab["model"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_policy(str(folder), ModelFlags(), trainable=False)


@pytest.mark.parametrize("mode", ["all", "lora"])
def test_an_adapter_that_is_not_finite(lab, tmp_path, mode):
    policy = load_policy(lab["model"], ModelFlags(finetune_mode="lora"))
    save_model(policy, tokenizer_for(), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(weights)[-1]
    weights[name][0, 0] = NAN
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{tmp_path}: {name} holds NaN"):
        load_policy(str(tmp_path), ModelFlags(finetune_mode=mode))


def test_a_tensor_of_another_shape_is_named_with_both(lab, tmp_path):
    folder = shutil.copytree(lab["model"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(16, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shapes = r"has the shape \(16, 32\), and its config.json asks for \(32, 32\)"
    with pytest.raises(UserError, match=rf"layers\.0\.self_attn\.q_proj\.weight {shapes}"):
        load_policy(str(folder), ModelFlags())
    two = shutil.copytree(lab["reward"], tmp_path / "two")
    weights = load_file(two / "model.safetensors")
    weights["score.weight"] = torch.zeros(2, 32)
    save_file(weights, two / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"score\.weight has the shape \(2, 32\).*give a reward model, which has one"):
        load_scorer(str(two), ModelFlags())


@pytest.mark.parametrize("kind", ["pickled", "shape of a pickle"])
def test_pickled_weights_are_read_and_compared_too(lab, tmp_path, kind):
    folder = shutil.copytree(lab["model"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind != "pickled":
        weights["model.norm.weight"] = torch.ones(7)
    torch.save(weights, folder / "pytorch_model.bin")
    if kind == "pickled":
        load_policy(str(folder), ModelFlags())
    else:
        with pytest.raises(UserError, match=r"its weights have other shapes than its config\.json asks for"):
            load_policy(str(folder), ModelFlags())


def test_roles_that_are_exchanged_and_a_base_that_is_missing(lab, tmp_path):
    """A reward model for a policy, a policy for a reward model, an adapter whose base was moved away."""
    with pytest.raises(UserError, match="is a reward model"):
        run("sft", lab, tmp_path / "out", model="reward")
    with pytest.raises(UserError, match="has no trained reward head"):
        run("ppo", lab, tmp_path / "out", rm_experiment_dir=lab["model"], critic_init="sft", reward=[])
    base = shutil.copytree(lab["model"], tmp_path / "base")
    save_model(load_policy(str(base), ModelFlags(finetune_mode="lora")), tokenizer_for(), tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=rf"adapter {tmp_path}/adapter is of the model {base}, and there is no such folder"
    ):
        run("sft", {**lab, "adapter": str(tmp_path / "adapter")}, tmp_path / "out", model="adapter")


def test_a_tokenizer_of_another_model_is_still_refused_first(lab, tmp_path):
    """C7: beside the check of sizes, the one of fingerprints."""
    other = make_model_dir(tmp_path / "other", tokenizer=make_tokenizer(bos=True, pad_is_eos=False))
    with pytest.raises(UserError, match="was tokenised by"):
        run("sft", {**lab, "other": other}, tmp_path / "out", model="other")
