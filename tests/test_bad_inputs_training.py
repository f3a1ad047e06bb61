"""What a user gets wrong with the training scripts and the evaluation: one sentence, status 2, nothing written."""

from __future__ import annotations

import pytest

from rlhf import rlhf_dpo, rlhf_evaluate, rlhf_grpo, rlhf_kto, rlhf_online_dpo, rlhf_ppo, rlhf_rm, rlhf_sft
from rlhf.flags import parse
from tests import bad_inputs
from tests.bad_inputs import (
    ARGS_FILES,
    DATA,
    DEVICES,
    MODELS,
    RUN,
    TEXTS_IN_ARGS_FILES,
    TYPES_IN_ARGS_FILES,
    WORDS,
    Case,
    EntryPoint,
    World,
)
from tests.splits import make_data

MACHINE = {"accelerator": "cpu", "precision": "32-true"}
TRAINING = {"data_dir": "{data}", "model_name": "{llama}", "experiment_dir": "{run}", "logger": "none", **MACHINE}
SHORT = {"max_steps": "1", "mini_batch_size": "2", "eval_interval": "0", "save_interval": "0"}
SAMPLING = {"reward": ["length:20"], "rollout_size": "2", "max_new_tokens": "4"}
ENTRIES = {
    "sft": EntryPoint(rlhf_sft.main, rlhf_sft.SFTFlags, {**TRAINING, **SHORT}),
    "rm": EntryPoint(rlhf_rm.main, rlhf_rm.RMFlags, {**TRAINING, **SHORT}),
    "dpo": EntryPoint(rlhf_dpo.main, rlhf_dpo.DPOFlags, {**TRAINING, **SHORT}),
    "kto": EntryPoint(rlhf_kto.main, rlhf_kto.KTOFlags, {**TRAINING, **SHORT}),
    "ppo": EntryPoint(rlhf_ppo.main, rlhf_ppo.PPOFlags, {**TRAINING, **SHORT, **SAMPLING, "critic_init": "zero"}),
    "grpo": EntryPoint(rlhf_grpo.main, rlhf_grpo.GRPOFlags, {**TRAINING, **SHORT, **SAMPLING}),
    "online_dpo": EntryPoint(rlhf_online_dpo.main, rlhf_online_dpo.OnlineDPOFlags, {**TRAINING, **SHORT, **SAMPLING}),
    "evaluate": EntryPoint(
        rlhf_evaluate.main,
        rlhf_evaluate.EvaluateFlags,
        {"data_dir": "{data}", "models": ["a={llama}"], "split": "validation", **MACHINE},
    ),
}
LEARNERS = ("sft", "rm", "dpo", "kto", "ppo", "grpo", "online_dpo")
SAMPLERS = ("ppo", "grpo", "online_dpo")
AFTER_SFT = ("rm", "dpo", "kto", "ppo", "grpo", "online_dpo")
STAGE = {"sft": "finetune", "rm": "preference", "dpo": "preference", "kto": "feedback"}

POLICIES: list[Case] = [({"model_name": "{reward}"}, "{reward} is a reward model")]
LATER_STAGES: list[Case] = [
    ({"sft_experiment_dir": "{nowhere}"}, "--sft_experiment_dir={nowhere}: there is no such folder"),
    ({"sft_experiment_dir": "{empty}"}, "--sft_experiment_dir={empty} holds no model"),
    ({"sft_experiment_dir": ""}, "--sft_experiment_dir is empty"),
]
LORA: list[Case] = [
    ({"finetune_mode": "lora", "lora_rank": "0"}, "--lora_rank=0 must be above 0"),
    ({"finetune_mode": "lora", "lora_targets": ["nothing"]}, "--lora_targets=['nothing']"),
    ({"lora_targets": []}, "--lora_targets needs a value"),
]
REFERENCES: list[Case] = [
    ({"reference": "{nowhere}"}, "--reference={nowhere}: there is no such folder"),
    ({"reference": "{reward}"}, "{reward} is a reward model"),
    ({"reference": "{t5}"}, "{t5} is an encoder-decoder"),
]
REWARDS: list[Case] = [
    ({"reward": None}, "no reward is given"),
    ({"reward": []}, "--reward needs a value"),
    ({"reward": [""]}, "--reward is empty"),
    ({"reward": ["nothing"]}, "'nothing' is no kind of reward"),
    ({"reward": ["0*exact"]}, "a weight of 0 gives no reward"),
    ({"reward": ["nan*exact"]}, "'nan*exact' is no kind of reward"),
    ({"reward": ["1e400*exact"]}, "a weight of inf gives no reward"),
    ({"reward": ["exact:3"]}, "exact takes no argument"),
    ({"reward": ["numeric:few"]}, "'few' is no number of 0 or more"),
    ({"reward": ["numeric:-1"]}, "'-1' is no number of 0 or more"),
    ({"reward": ["numeric:nan"]}, "'nan' is no number of 0 or more"),
    ({"reward": ["length"]}, "'' is no number of 1 or more"),
    ({"reward": ["length:0"]}, "'0' is no number of 1 or more"),
    ({"reward": ["overlong:9:3"]}, "'9:3' is no range of tokens"),
    ({"reward": ["overlong:3"]}, "'3' is no range of tokens"),
    ({"reward": ["repetition:0"]}, "'0' is no number of 1 or more"),
    ({"reward": ["keyword:,"]}, "it names no word"),
    ({"reward": ["regex:"]}, "it has no pattern"),
    ({"reward": ["regex:("]}, "it is no regular expression"),
    ({"reward": ["http:nowhere"]}, "is no URL"),
    ({"reward": ["http:"]}, "is no URL"),
    ({"reward": ["https://[broken/x"]}, "is no URL"),
    ({"reward": ["http://host:port/x"]}, "is no URL"),
    ({"reward": ["function:"]}, "does not say which function"),
    ({"reward": ["function:reward"]}, "does not say which function"),
    ({"reward": ["function:{nowhere}.py:reward"]}, "there is no file {nowhere}.py"),
    ({"reward": ["function:{too_long}.py:reward"]}, "File name too long"),
    ({"reward": ["function:{no_import}:reward"]}, "No module named 'a_package_that_is_not_there'"),
    ({"reward": ["function:{no_syntax}:reward"]}, "{no_syntax} can't be imported"),
    ({"reward": ["function:{exits}:reward"]}, "{exits} can't be imported"),
    ({"reward": ["function:{no_function}:reward"]}, "has no function 'reward'"),
    ({"reward": ["function:{good_function}:other"]}, "has no function 'other'"),
    ({"reward": ["function:no_such_module:reward"]}, "no_such_module can't be imported"),
    ({"reward": ["function:.relative:reward"]}, "does not say which function"),
    ({"reward": ["model:"]}, "no model is given; set --reward"),
    ({"reward": ["model:{nowhere}"]}, "there is no such folder"),
    ({"reward": ["model:{llama}"]}, "has no trained reward head"),
    ({"reward": ["model:{too_long}"]}, "file name too long"),
    ({"rm_experiment_dir": "{nowhere}"}, "--rm_experiment_dir={nowhere}: there is no such folder"),
    ({"rm_experiment_dir": "{llama}"}, "{llama} is a language model"),
    ({"rm_experiment_dir": "{t5}"}, "{t5} is an encoder-decoder"),
    ({"rm_experiment_dir": "{empty}"}, "--rm_experiment_dir={empty} holds no model"),
]
ON_POLICY: list[Case] = [
    ({"top_k": "5"}, "leave --top_k=0"),
    ({"top_p": "0.5"}, "--top_p=1"),
    ({"do_sample": "False"}, "--do_sample=True"),
    ({"disable_dropout": "False"}, "leave --disable_dropout=True"),
    ({"rollout_size": "3"}, "--rollout_size=3 is no multiple of --mini_batch_size=2"),
]
OWN: dict[str, list[Case]] = {
    "sft": [({"use_targets": "maybe"}, "--use_targets=maybe must be True or False")],
    "rm": [({"loss_type": "mean"}, "--loss_type=mean must be one of last_token, average, per_sample")],
    "dpo": [
        ({"reference": "{llama}", "reference_free": "True"}, "contradict"),
        ({"label_smoothing": "0.1", "loss_type": ["ipo"]}, "--label_smoothing has no meaning"),
        ({"label_smoothing": "0.7"}, "--label_smoothing=0.7 must be in [0, 0.5)"),
        ({"loss_type": ["dpo"]}, "--loss_type dpo: dpo is none of"),
        ({"loss_type": []}, "--loss_type needs a value"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
        ({"loss_weights": ["1", "2"]}, "--loss_weights needs one weight for each"),
        ({"loss_weights": ["nan"]}, "--loss_weights=nan must be a finite number"),
        ({"ref_mixup": "0.5"}, "--ref_mixup needs --ref_update_interval"),
        ({"ref_update_interval": "2", "finetune_mode": "lora"}, "--ref_update_interval needs a reference"),
        ({"loss_type": ["exo_pair"]}, "needs a --label_smoothing above 0"),
        ({"f_divergence": "js", "loss_type": ["aot"]}, "--f_divergence"),
    ],
    "kto": [
        ({"loss_type": "bco", "undesirable_weight": "2"}, "--undesirable_weight has no meaning with"),
        ({"desirable_weight": "-1"}, "--desirable_weight=-1.0 must not be below 0"),
        ({"data_dir": "{single}"}, "feedback_train.pt has 1 row"),
    ],
    "ppo": [
        ({"critic_init": "reward"}, "--critic_init=reward starts the critic as the reward model"),
        ({"whiten_rewards": "True"}, "--whiten_rewards needs --rollout_size of 8 or more"),
        ({"center_rewards": "True"}, "--center_rewards has no meaning"),
        ({"ptx_coef": "0.1", "data_dir": "{only_prompts}"}, "finetune_train.pt is missing"),
    ],
    "grpo": [
        ({"num_samples": "1"}, "--num_samples must be 2 or more"),
        ({"kl_in": "loss"}, "no meaning without --kl_coef"),
        ({"kl_unbiased": "True"}, "--kl_unbiased has no meaning"),
        ({"kl_coef": "0.1", "kl_estimator": "k1"}, "--kl_estimator=k1 in the loss"),
        ({"loss_type": "gspo", "loss_normalization": "token"}, "would weight GSPO's responses"),
        ({"max_resamples": "1"}, "--max_resamples has no meaning"),
        ({"dynamic_sampling": "True", "advantage": "reinforce_pp"}, "--advantage=reinforce_pp learns from"),
    ],
    "online_dpo": [
        ({"num_samples": "1"}, "--num_samples=1 makes no pair"),
        ({"judge": "{nowhere}.py:judge"}, "there is no file {nowhere}.py"),
        ({"judge": "reward"}, "does not say which function"),
        ({"judge": "{good_function}:judge"}, "has no function 'judge'"),
        ({"judge": "{good_function}:reward", "num_samples": "3"}, "--judge compares two responses"),
        ({"loss_type": ["orpo"]}, "--loss_type orpo"),
    ],
    "evaluate": [
        ({"models": None}, "--models is missing"),
        ({"models": []}, "--models needs a value"),
        ({"models": ["{llama}"]}, "is not of the form name=folder"),
        ({"models": ["a="]}, "is not of the form name=folder"),
        ({"models": ["=x"]}, "is not of the form name=folder"),
        ({"models": ["a={llama}", "a={llama}"]}, "the name 'a' is given twice"),
        ({"models": ["a={nowhere}"]}, "there is no such folder"),
        ({"models": ["a={llama}", "b={reward}"]}, "{reward} is a reward model"),
        ({"models": ["a={llama}", "b={t5}"]}, "{t5} is an encoder-decoder"),
        ({"models": ["a={too_long}"]}, "file name too long"),
        ({"models": ["a={no_tokenizer}"]}, "{no_tokenizer}"),
        ({"baseline": "b"}, "--baseline=b is none of the models (a)"),
        ({"split": "test"}, "has no test split"),
        ({"split": "all"}, "--split=all must be one of test, validation, train"),
        ({"rm_experiment_dir": "{llama}"}, "has no trained reward head"),
        ({"rm_experiment_dir": "{nowhere}"}, "--rm_experiment_dir={nowhere}"),
        ({"output": "{empty}"}, "--output={empty} is a folder"),
        ({"output": "{inside_file}"}, "--output={file} is a file"),
        ({"data_dir": "{no_rows}"}, "has no validation split"),
    ],
}
"""What only one script knows."""


def cases_of(script: str) -> list[Case]:
    """All hand-written cases of a script."""
    found = [*WORDS, *DEVICES, *OWN[script], *DATA[:7]]
    if script in LEARNERS:
        found += [*ARGS_FILES, *TYPES_IN_ARGS_FILES, *TEXTS_IN_ARGS_FILES, *MODELS, *DATA[7:], *RUN, *LORA]
    found += POLICIES if script in LEARNERS and script != "rm" else []
    found += LATER_STAGES if script in AFTER_SFT else []
    found += REFERENCES if script in ("dpo", "kto", "online_dpo") else []
    found += [*REWARDS, *ON_POLICY] if script in SAMPLERS else []
    if script in STAGE:
        found.append(({"data_dir": "{only_prompts}"}, f"{STAGE[script]}_train.pt is missing"))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = bad_inputs.make_world(tmp_path_factory.mktemp("bad"))
    single = made.root / "single"
    made.paths["single"] = make_data(single, num_train=1, num_validation=0)
    made.paths["only_prompts"] = make_data(made.root / "only_prompts", num_train=2, num_validation=1)
    for path in (made.root / "only_prompts").glob("*"):
        if path.name.startswith(("finetune", "preference", "feedback")):
            path.unlink()
    return made


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch):
    """The machine of these cases: one CPU, no wandb."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("rlhf.experiment.logs.find_spec", lambda name: None)


@pytest.mark.parametrize("script", ENTRIES)
def test_a_mistake_is_one_sentence_status_2_and_nothing_written(world, monkeypatch, capsys, script):
    """DESIGN.md section 11; C2 (samplers), C7 (tokenizers), C37 (rewards): forty and more for each script."""
    cases = cases_of(script)
    assert len(cases) >= 40
    bad_inputs.check_all(ENTRIES[script], world, cases, monkeypatch, capsys)


def test_no_flag_takes_a_value_that_it_cannot_have(tmp_path, monkeypatch, capsys):
    """C21: a word for a number, NaN, infinities, numbers out of range, wrong choices, nothing: for every flag."""
    known: set[str] = set()
    for entry in ENTRIES.values():
        cases = [({name: value}, f"error: --{name}") for name, value in bad_inputs.wrong_values(entry, known)]
        bad_inputs.check_all(entry, World(tmp_path, {}), cases, monkeypatch, capsys)
    assert len(known) > 120


def test_what_is_not_wrong_is_let_through(world):
    """The command lines that the cases spoil are good ones."""
    for entry in ENTRIES.values():
        assert isinstance(parse(entry.flags, bad_inputs.words_of(world.filled(entry.good))), entry.flags)
