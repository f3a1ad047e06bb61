"""TRL beside the scripts: the same rows in the same order, from the same weights, loss by loss.

Both sides run their own training loop whole: `rlhf_*.main` here, TRL's trainers there. What is given to both: rows as
token ids, in file order; one batch a step; float32; AdamW with equal betas and epsilon and no weight decay; no
warm-up; the same clip of the gradient norm; dropout off.

Where TRL 1.16.0 and the scripts differ, and what these runs do about it:
1. Weight decay: TRL (by `Trainer`) decays embeddings, the scripts don't. Both are given 0.
2. Warm-up of W steps: `Trainer` begins at rate 0, the scripts at 1 / W of the peak. Both are given none.
3. The head of a new reward model: N(0, 0.02) by transformers, N(0, 1 / (hidden + 1)) here. TRL is given the
   script's.
4. Tokenisation: TRL's DPO and KTO trainers always tokenise text, and cut where the tokens of the prompt and of the
   whole part. DPO's preparation of the data is left out, so that it gets the rows of the split as they are; KTO's
   pairs each prompt with another response, so it runs, on rows whose text is the list of their tokens.
5. A step of several micro-batches: TRL's RM, DPO and KTO average the means of the micro-batches (KTO with a KL for
   each), the scripts take the mean over the rows of the step. TRL is given one micro-batch a step.
6. TRL's CPO and ORPO trainers tokenise text too: they are given the split's own rows in place of it. SimPO is CPO's
   trainer with a likelihood of weight 0.
7. Dropout: TRL's SFT trainer leaves it as the model has it. It is given a model without.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from rlhf import rlhf_dpo, rlhf_kto, rlhf_rm, rlhf_sft
from rlhf.data.splits import Split, load_split
from rlhf.models.forward import padded_rows
from rlhf.models.policy import Policy, Scorer

ROOT = Path(__file__).resolve().parents[1]
TRL_WITH_PPO = ROOT / ".peers" / "trl-1.12.0"
"""TRL 1.12.0, the last release that has PPO; tests/run.sh installs it."""

Stage = str
REFERENCE_FREE: dict[Stage, dict[str, Any]] = {
    "orpo": {"loss_type": ["orpo"]},
    "cpo": {"loss_type": ["cpo"]},
    "simpo": {"loss_type": ["simpo"], "beta": 2.0},
}
"""Stages that TRL has trainers of their own for, and the flags of the script."""
PAIRWISE: dict[Stage, dict[str, Any]] = {
    "dpo": {},
    "ipo": {"loss_type": ["ipo"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "discopop": {"loss_type": ["discopop"]},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "sppo_hard": {"loss_type": ["sppo_hard"], "beta": 0.5},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "sft_coef": 1.0},
    "ld_dpo": {"ld_alpha": 0.5},
    "ln_dpo": {"length_normalize": True, "beta": 5.0},
    "js_dpo": {"f_divergence": "js"},
    "wpo": {"loss_type": ["sigmoid"], "loss_weights": [20.0], "wpo_weighting": True},
    "tr_dpo": {"ref_update_interval": 3, "ref_mixup": 0.5},
    **REFERENCE_FREE,
}
"""Stages of rlhf_dpo.py, and its flags."""
FEEDBACK: tuple[Stage, ...] = ("kto", "apo_zero_unpaired")
"""Stages on single responses; the name is the --loss_type on both sides."""
STAGES: tuple[Stage, ...] = ("sft", "rm", "dpo", "ipo", *FEEDBACK, *REFERENCE_FREE)
MORE_STAGES: tuple[Stage, ...] = tuple(stage for stage in PAIRWISE if stage not in STAGES)


def require_trl() -> None:
    """Skip the test where TRL 1.16.0 is not installed; fail it where RLHF_REQUIRE_PEERS says that it has to be."""
    if importlib.util.find_spec("trl") is None:
        _missing("TRL is not installed; install this project with its `peer` extra")


def require_trl_with_ppo() -> None:
    """The same for TRL 1.12.0 in .peers/."""
    if not (TRL_WITH_PPO / "trl").is_dir():
        place = TRL_WITH_PPO.relative_to(ROOT)
        _missing(f"{place} is missing; `bash tests/run.sh` (pip install --no-deps --target {place} trl==1.12.0)")


def _missing(message: str) -> None:
    import pytest

    if os.environ.get("RLHF_REQUIRE_PEERS"):
        pytest.fail(message)
    pytest.skip(message)


@dataclass(kw_only=True)
class Comparison:
    """What both sides are given.

    Attributes:
        model, data: folders of a language model and of prepared data.
        batch: rows (pairs) of a step; micro_batch: how many the script runs at once (all unless set).
        clip: largest gradient norm.
        use_targets: SFT on the responses, or on all tokens.
    """

    stage: Stage
    model: str
    data: str
    work: Path
    steps: int = 20
    batch: int = 4
    micro_batch: int | None = None
    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear"] = "linear"
    clip: float = 1.0
    use_targets: bool = True
    seed: int = 42


@dataclass
class Trajectory:
    """Loss of each step, and the token ids of every sequence that the model was trained on, in order."""

    losses: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)


def compare(comparison: Comparison) -> tuple[Trajectory, Trajectory]:
    """Train with the script, then with TRL; their trajectories."""
    ours = train_here(comparison)
    gc.collect()
    theirs = train_in_trl(comparison)
    gc.collect()
    return ours, theirs


def train_here(comparison: Comparison) -> Trajectory:
    """Run the stage's script in process. The reward model's first weights are left in `work / "start"`."""
    c, trajectory = comparison, Trajectory()
    folder = c.work / f"{c.stage}-here"
    flags = {
        "data_dir": c.data,
        "model_name": c.model,
        "experiment_dir": str(folder),
        "shuffle": False,
        "seed": c.seed,
        "epochs": c.steps,
        "max_steps": c.steps,
        "mini_batch_size": c.batch,
        "micro_batch_size": c.micro_batch or c.batch,
        "learning_rate": c.learning_rate,
        "lr_schedule": c.schedule,
        "gradient_clip_val": c.clip,
        "disable_dropout": True,
        "eval_interval": 0,
        "save_interval": 0,
        "logger": "none",
        "accelerator": "cpu",
        "devices": "1",
        "precision": "32-true",
        "memory_check": "none",  # its passes would be noted too
    }
    with _watched(trajectory.rows):
        if c.stage == "sft":
            rlhf_sft.main(rlhf_sft.SFTFlags(**flags, use_targets=c.use_targets, max_new_tokens=1))
        elif c.stage == "rm":
            with mock.patch.object(rlhf_rm, "load_scorer", _saving(rlhf_rm.load_scorer, c.work / "start")):
                rlhf_rm.main(rlhf_rm.RMFlags(**flags, loss_type="last_token"))
        elif c.stage in FEEDBACK:
            rlhf_kto.main(rlhf_kto.KTOFlags(**flags, loss_type=c.stage, max_new_tokens=1))
        else:
            rlhf_dpo.main(rlhf_dpo.DPOFlags(**flags, **PAIRWISE[c.stage], max_new_tokens=1))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trajectory.losses = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    return trajectory


@contextmanager
def _watched(rows: list[list[int]]) -> Iterator[None]:
    """Note every sequence that a model is trained on."""

    def watching(forward: Callable) -> Callable:
        def watched(role, forest, *args, **kwargs):
            if torch.is_grad_enabled():
                rows.extend(_real_tokens(padded_rows(forest)))
            return forward(role, forest, *args, **kwargs)

        return watched

    with (
        mock.patch.object(Policy, "forward", watching(Policy.forward)),
        mock.patch.object(Scorer, "forward", watching(Scorer.forward)),
    ):
        yield


def _real_tokens(inputs: dict[str, Tensor], prefix: str = "") -> list[list[int]]:
    pairs = zip(inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"].bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def _saving(load: Callable, folder: Path) -> Callable:
    def load_and_save(*args, **kwargs):
        scorer = load(*args, **kwargs)
        scorer.model.save_pretrained(folder)
        return scorer

    return load_and_save


def train_in_trl(comparison: Comparison) -> Trajectory:
    """Run TRL's trainer of the stage; for "rm" after `train_here`, from the weights that it left."""
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.trainer.utils import disable_dropout_in_model

    from rlhf.data.text import load_tokenizer, pad_token_id

    c, trajectory = comparison, Trajectory()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(c.model)
    pad = pad_token_id(tokenizer)
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    settings = {
        "output_dir": str(c.work / f"{c.stage}-trl"),
        "max_steps": c.steps,
        "per_device_train_batch_size": c.batch,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": c.learning_rate,
        "lr_scheduler_type": c.schedule,
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": c.clip,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": c.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    split = load_split(c.data, data_stage_of(c.stage), "train")

    def language_model():
        return AutoModelForCausalLM.from_pretrained(c.model, dtype=torch.float32)

    if c.stage == "sft":
        model, options = language_model(), {}
        disable_dropout_in_model(model)
        trainer_class, args = trl.SFTTrainer, trl.SFTConfig(**settings)
    elif c.stage == "rm":
        start = str(c.work / "start")
        model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
        options = {}
        trainer_class, args = trl.RewardTrainer, trl.RewardConfig(**settings)
    elif c.stage in REFERENCE_FREE:
        model, options = language_model(), {}
        trainer_class, args = reference_free_trainer(c.stage, settings)
    elif c.stage in FEEDBACK:
        model, options = language_model(), {"ref_model": language_model()}
        trainer_class, args = trl.KTOTrainer, trl.KTOConfig(**settings, loss_type=c.stage)
    else:
        model, options = language_model(), {"ref_model": language_model()}
        trainer_class, args = trl.DPOTrainer, trl.DPOConfig(**settings, **trl_options(PAIRWISE[c.stage]))

    class Watched(trainer_class):
        """The trainer, noting what comes to its model and what loss goes out."""

        def _prepare_dataset(self, dataset, *rest):
            if trainer_class is trl.DPOTrainer:
                return dataset
            if trainer_class is trl.KTOTrainer:
                with mock.patch("trl.trainer.kto_trainer._tokenize", _tokens_of_text):
                    return super()._prepare_dataset(dataset, *rest)
            return super()._prepare_dataset(dataset, *rest)

        def tokenize_row(self, feature, *rest):  # of the CPO and ORPO trainers
            return tokenized(split[feature["row"]])

        def compute_loss(self, model, inputs, *rest, **kwargs):
            if c.stage in REFERENCE_FREE:
                rows = [row for side in ("chosen", "rejected") for row in _real_tokens(inputs, f"{side}_")]
            else:
                rows = _real_tokens(inputs)
            if c.stage not in ("sft", *FEEDBACK):  # chosen rows, then rejected ones: the order here is pair by pair
                half = len(rows) // 2
                rows = [row for pair in zip(rows[:half], rows[half:], strict=True) for row in pair]
            trajectory.rows.extend(rows)
            loss = super().compute_loss(model, inputs, *rest, **kwargs)
            trajectory.losses.append(loss.item())
            return loss

    trainer = Watched(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows_for_trl(split, c, tokenizer.eos_token)),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    return trajectory


def data_stage_of(stage: Stage) -> str:
    """The stage of the data that a comparison trains on."""
    return {"sft": "finetune", **dict.fromkeys(FEEDBACK, "feedback")}.get(stage, "preference")


def _tokens_of_text(tokenizer, text: str, **_) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.removesuffix(tokenizer.eos_token).split()]}


def rows_for_trl(split: Split, comparison: Comparison, eos_token: str = "") -> list[dict[str, Any]]:
    """The rows of a split under the names that TRL's trainers have for token ids; for KTO as text of their numbers."""
    if comparison.stage == "sft":
        labels = "targets" if comparison.use_targets else "input_ids"
        return [{"input_ids": row["input_ids"].tolist(), "labels": row[labels].tolist()} for row in split]
    if comparison.stage in REFERENCE_FREE:  # text that is passed over, and the row that takes its place
        return [{"prompt": "", "chosen": "", "rejected": "", "row": i} for i in range(len(split))]
    rows = []
    if comparison.stage in FEEDBACK:
        for row in split:
            n, words = row["prompt_len"], [str(token) for token in row["input_ids"].tolist()]
            prompt, completion = " ".join(words[:n]) + " ", " ".join(words[n:]) + eos_token
            rows.append({"prompt": prompt, "completion": completion, "label": row["label"]})
        return rows
    for row in split:
        n = 0 if comparison.stage == "rm" else row["prompt_len"]
        chosen, rejected = row["chosen_input_ids"].tolist(), row["rejected_input_ids"].tolist()
        rows.append({"prompt_ids": chosen[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]})
    return rows


def reference_free_trainer(stage: Stage, settings: dict[str, Any]) -> tuple[type, Any]:
    """TRL's trainer of ORPO, or of CPO and (without CPO's likelihood) SimPO, with its defaults."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    if stage == "orpo":
        return ORPOTrainer, ORPOConfig(**settings)
    simpo = {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}
    return CPOTrainer, CPOConfig(**settings, **(simpo if stage == "simpo" else {}))


def trl_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of rlhf_dpo.py as TRL's DPOConfig calls them."""
    options = dict(flags)
    if options.pop("length_normalize", False):
        options["loss_type"] = ["sigmoid_norm"]
    if "sft_coef" in options:
        options["loss_type"] = [*options["loss_type"], "sft"]
        options["loss_weights"] = [*options["loss_weights"], options.pop("sft_coef")]
    if "f_divergence" in options:
        options["f_divergence_type"] = f"{options.pop('f_divergence')}_divergence"
    if "wpo_weighting" in options:
        options["use_weighting"] = options.pop("wpo_weighting")
    if "ref_update_interval" in options:
        options |= {
            "sync_ref_model": True,
            "ref_model_sync_steps": options.pop("ref_update_interval"),
            "ref_model_mixup_alpha": options.pop("ref_mixup"),
        }
    return options


def tokenized(row: dict[str, Any]) -> dict[str, list[int]]:
    """A row of a split as the CPO and ORPO trainers tokenise their own."""
    found, n = {"prompt_input_ids": row["chosen_input_ids"][: row["prompt_len"]].tolist()}, row["prompt_len"]
    found["prompt_attention_mask"] = [1] * n
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_input_ids"].tolist()
        found[f"{side}_input_ids"], found[f"{side}_attention_mask"] = ids, [1] * len(ids)
        found[f"{side}_labels"] = [-100] * n + ids[n:]
    return found
