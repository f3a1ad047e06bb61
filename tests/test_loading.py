"""Models from folders: heads, trunks, what is trained, and the sentences for what cannot be loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import UserError
from rlhf.flags import ModelFlags
from rlhf.models.loading import load_policy, load_scorer, resolve, save_model, tokenizer_of
from rlhf.models.policy import Policy, Scorer
from rlhf.trees.forest import Forest, Tree
from tests.splits import make_model_dir, tokenizer_for
from tests.tiny import make_model

FOREST = Forest([Tree.of(torch.arange(5), torch.arange(7, 12), torch.arange(20, 29))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A language model and a reward model of the same size, with their tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {
        "policy": make_model_dir(root / "policy"),
        "reward": make_model_dir(root / "reward", scorer=True, seed=1),
        "dropout": make_model_dir(root / "dropout", "gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
        "opt": make_model_dir(root / "opt", "opt", dropout=0.3, attention_dropout=0.3),
    }


def scores(scorer: Scorer) -> torch.Tensor:
    with torch.no_grad():
        return scorer(FOREST, FOREST.branch_last)


def test_r2_a_new_head_is_small_and_has_no_bias(tmp_path):
    """R2: weights N(0, 1 / (d + 1)), for d = 512 their deviation within 5 %, over ten heads; bias 0 (there is none)."""
    size = {"hidden_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
    folder = make_model_dir(tmp_path, **size)
    heads = [load_scorer(folder, ModelFlags(), new_head=True).head for _ in range(10)]
    weights = torch.stack([head.weight for head in heads])
    assert all(head.bias is None for head in heads)
    assert not torch.equal(weights[0], weights[1])
    assert weights.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.05)
    assert weights.mean().item() == pytest.approx(0, abs=4 / math.sqrt(513 * weights.numel()))


def test_r3_the_trunk_is_the_policys(folders):
    """R3: every weight of a new reward model but its head equals the SFT model's."""
    scorer, plain = load_scorer(folders["policy"], ModelFlags(), new_head=True), load_file(_weights(folders["policy"]))
    mine = dict(scorer.model.named_parameters())
    assert set(plain) - set(mine) <= {"lm_head.weight"}
    assert set(mine) - set(plain) == {"score.weight"}
    assert all(torch.equal(mine[name], value) for name, value in plain.items() if name in mine)


@pytest.mark.parametrize("name", ["dropout", "opt"])
def test_r6_p4_dropout_is_off_when_asked(folders, name):
    """R6, P4: in `train()` two forwards are bit-equal with --disable_dropout, and differ without it."""
    for load in (load_policy, lambda *args: load_scorer(*args, new_head=True)):
        for off in (True, False):
            role = load(folders[name], ModelFlags(disable_dropout=off))
            assert role.training
            first, second = (
                role(FOREST)[0] if isinstance(role, Policy) else role(FOREST, FOREST.branch_last) for _ in range(2)
            )
            assert torch.equal(first, second) == off
            config = role.model.config
            assert 0.3 in (getattr(config, "attn_pdrop", None), getattr(config, "attention_dropout", None))


def test_a_frozen_model_is_in_evaluation_mode(folders):
    for role in (
        load_policy(folders["dropout"], ModelFlags(), trainable=False),
        load_scorer(folders["reward"], ModelFlags(), trainable=False),
    ):
        assert not role.training
        assert not any(p.requires_grad for p in role.parameters())


@pytest.mark.parametrize(("architecture", "norm"), [("llama", "model.norm"), ("opt", "model.decoder.final_layer_norm")])
def test_last_layer_trains_the_last_block_the_final_norm_and_the_head(tmp_path, architecture, norm):
    """--finetune_mode=last_layer; a head tied to the embeddings stays frozen with them."""
    for tied in (True, False):
        folder = make_model_dir(tmp_path / str(tied), architecture, tie_word_embeddings=tied)
        policy = load_policy(folder, ModelFlags(finetune_mode="last_layer"))
        trained = set(policy.own_parameters())
        blocks = {".".join(name.split(".")[:-2]) for name in trained if ".layers." in name}
        assert blocks
        assert all(".layers.1" in block for block in blocks)
        assert any(name.startswith(f"model.{norm}") for name in trained)
        assert ("model.lm_head.weight" in trained) == (not tied)
        assert not any("embed" in name for name in trained)
        policy(FOREST)[0].sum().backward()
        assert all(p.grad is not None for p in policy.own_parameters().values())


def test_last_layer_of_a_reward_model_trains_its_head(folders):
    scorer = load_scorer(folders["policy"], ModelFlags(finetune_mode="last_layer"), new_head=True)
    assert any("score" in name or "head" in name for name in scorer.own_parameters())


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_saved_folders_load_with_transformers_alone(tmp_path, folders, kind):
    """`final/` gives our numbers in a plain transformers model; A2: the vocabulary keeps its size."""
    flags = ModelFlags()
    if kind == "policy":
        role, plain_class = load_policy(folders["policy"], flags), AutoModelForCausalLM
    else:
        role, plain_class = load_scorer(folders["policy"], flags, new_head=True), AutoModelForSequenceClassification
    save_model(role, tokenizer_of(folders["policy"], flags), tmp_path)
    plain = plain_class.from_pretrained(tmp_path).eval()
    assert plain.get_input_embeddings().weight.shape[0] == len(tokenizer_for())
    row = torch.cat([torch.arange(5), torch.arange(7, 12)])
    with torch.no_grad():
        if kind == "policy":
            expected = plain(row[None]).logits[0, 4:-1].log_softmax(-1)[range(5), row[5:]].sum()
            found = FOREST.per_branch(role(FOREST)[0])[0]
        else:
            expected, found = plain(row[None]).logits[0, 0], scores(role)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_c6_a_saved_reward_model_reads_the_last_token_in_transformers_too(tmp_path, pad_is_eos):
    """C6: with pad = EOS, transformers would take the closing EOS for padding and read one token early, silently.

    With a padding token of its own a batch works; with none, one row at a time is right and a batch is refused.
    """
    tokenizer = tokenizer_for(pad_is_eos=pad_is_eos)
    folder = make_model_dir(tmp_path / "sft", tokenizer=tokenizer)
    scorer = load_scorer(folder, ModelFlags(), new_head=True)
    save_model(scorer, tokenizer_of(folder, ModelFlags()), tmp_path / "final")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    eos = tokenizer.eos_token_id
    rows = [torch.tensor([50, 51, eos, 52, 53, eos]), torch.tensor([60, 61, 62, eos])]
    forest = Forest([Tree.of(row[:3], row[3:]) for row in rows])
    with torch.no_grad():
        mine = scorer(forest, forest.branch_last)
        alone = torch.stack([plain(row[None]).logits[0, 0] for row in rows])
        torch.testing.assert_close(mine, alone, rtol=0, atol=1e-5)
        pads = torch.full((2, 6), plain.config.pad_token_id if not pad_is_eos else eos)
        pads[0], pads[1, :4] = rows[0], rows[1]
        if pad_is_eos:
            with pytest.raises(ValueError, match="no padding token"):
                plain(pads)
        else:
            torch.testing.assert_close(plain(pads).logits[:, 0], mine, rtol=0, atol=1e-5)


def test_r7_mean_and_scale_are_kept_with_the_model(tmp_path, folders):
    """R7: what a reward model was normalised with comes back from its config.json; a new head starts at (0, 1)."""
    scorer = load_scorer(folders["reward"], ModelFlags())
    assert (scorer.reward_mean, scorer.reward_scale) == (0.0, 1.0)
    scorer.reward_mean, scorer.reward_scale = 1.25, 0.5
    save_model(scorer, tokenizer_for(), tmp_path)
    again = load_scorer(str(tmp_path), ModelFlags(), trainable=False)
    assert (again.reward_mean, again.reward_scale) == (1.25, 0.5)
    assert load_scorer(str(tmp_path), ModelFlags(), new_head=True).reward_mean == 0.0


def test_c15_a_random_head_at_scoring_time_is_an_error(tmp_path, folders):
    """C15: neither a language model nor a reward model whose head was lost can score."""
    with pytest.raises(UserError, match=r"no trained reward head.*rlhf_rm\.py"):
        load_scorer(folders["policy"], ModelFlags(), trainable=False)
    scorer = load_scorer(folders["reward"], ModelFlags())
    save_model(scorer, tokenizer_for(), tmp_path)
    weights = load_file(_weights(tmp_path))
    del weights["score.weight"]
    save_file(weights, _weights(tmp_path), metadata={"format": "pt"})
    with pytest.raises(UserError, match="no trained reward head"):
        load_scorer(str(tmp_path), ModelFlags(), trainable=False)


def test_a_missing_weight_is_an_error(tmp_path, folders):
    """Not a fresh one: a folder that lacks a layer would train something else."""
    make_model("llama", vocab_size=len(tokenizer_for()), tie_word_embeddings=False).save_pretrained(tmp_path)
    weights = load_file(_weights(tmp_path))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, _weights(tmp_path), metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights of model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(str(tmp_path), ModelFlags())


@pytest.mark.parametrize("finetune_mode", ["all", "lora"])
@pytest.mark.parametrize("damage", ["cut", "empty", "overwritten"])
def test_a_broken_weight_file_is_one_sentence_that_names_it(tmp_path, folders, damage, finetune_mode):
    """A copy that was cut short, a full disk: of whole models and of adapters, in one file and in several."""
    flags, tokenizer = ModelFlags(finetune_mode=finetune_mode), tokenizer_for()
    policy = load_policy(folders["policy"], ModelFlags(finetune_mode="lora"))
    save_model(policy, tokenizer, tmp_path / "adapter")
    whole = load_policy(folders["policy"], ModelFlags()).model
    whole.save_pretrained(tmp_path / "model")
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for name, place in (("adapter", 0), ("model", 0), ("sharded", -1)):
        load_policy(str(tmp_path / name), flags)
        file = sorted((tmp_path / name).glob("*.safetensors"))[place]
        content = file.read_bytes()
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "overwritten": b"\x93 no " * 40}[damage])
        with pytest.raises(UserError, match=rf"the weights in {file} cannot be read \(.+\); write or copy"):
            load_policy(str(tmp_path / name), flags)
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    whole.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{tmp_path}/pytorch_model.bin is damaged .*\(it ends too early\)"):
        load_policy(str(tmp_path), flags)


def test_what_is_no_policy_is_named(tmp_path, folders):
    with pytest.raises(UserError, match="is a reward model"):
        load_policy(folders["reward"], ModelFlags())
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="encoder-decoder"):
        load_policy(str(tmp_path / "t5"), ModelFlags())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(str(tmp_path / "broken"), ModelFlags())
    with pytest.raises(UserError, match="neither a local folder nor reachable on the hub"):
        load_policy("nobody/nothing", ModelFlags())


def test_resolve_takes_an_experiment_a_model_or_a_hub_id(tmp_path, folders):
    """`final/` before the last checkpoint before the best one; a path that is none is an error with its flag."""
    experiment = tmp_path / "run"
    checkpoint, best = experiment / "checkpoints" / "step-00000002", experiment / "checkpoints" / "best"
    (best / "model").mkdir(parents=True)
    (best / "model" / "config.json").touch()
    assert resolve(str(experiment), "x") == resolve(str(best), "x") == str(best / "model")
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "config.json").touch()
    (experiment / "checkpoints" / "last").symlink_to("step-00000002")
    assert Path(resolve(str(experiment), "x")).resolve() == checkpoint / "model"
    assert resolve(str(checkpoint), "x") == str(checkpoint / "model")
    (experiment / "final").mkdir()
    (experiment / "final" / "config.json").touch()
    assert resolve(str(experiment), "x") == str(experiment / "final")
    assert resolve(folders["policy"], "x") == folders["policy"]
    assert resolve("someone/model", "x") == "someone/model"
    for source, complaint in ((None, "set --x"), ("/no/such", "no such folder"), (str(tmp_path), "holds no model")):
        with pytest.raises(UserError, match=complaint):
            resolve(source, "x")


def test_c1_a2_the_pad_token_is_not_eos_where_there_is_a_choice(folders, tmp_path):
    """C1, A2: a tokenizer's own pad token stays; with pad = EOS a spare special token pads, and with none the
    vocabulary is not enlarged."""
    assert tokenizer_of(folders["policy"], ModelFlags()).pad_token == "<|pad|>"
    tokenizer = tokenizer_for(pad_is_eos=True)
    folder = make_model_dir(tmp_path, tokenizer=tokenizer)
    assert len(tokenizer_of(folder, ModelFlags())) == len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reserved|>"]})
    tokenizer.save_pretrained(tmp_path / "spare")
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer_of(str(tmp_path / "spare"), ModelFlags()).pad_token == "<|reserved|>"


def _weights(folder: str | Path) -> Path:
    return Path(folder) / "model.safetensors"
