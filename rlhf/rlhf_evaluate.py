"""Evaluate models side by side on held-out data: perplexity, reward, KL, win rate, implicit-reward accuracy.

For every model: perplexity of the held-out responses; sampled answers to held-out prompts with several seeds,
scored by a reward model; the KL of those answers to a baseline, in nats a response (the mean of log pi - log ref
over sampled tokens, summed over each response); how often an answer beats the baseline's answer to the same prompt
with the same seed, the reward model judging (a tie is half a win); and on held-out pairs how often the implicit
reward log pi - log baseline prefers the chosen response (Rafailov et al. 2023, arXiv 2305.18290, section 6).

Every mean comes with its number of prompts and a 95 % interval over prompts (the seeds of a prompt are averaged
first, as they are not independent), and the win rate with a two-sided paired p-value against one half.

CPU: python rlhf/rlhf_evaluate.py --data_dir=data/hh --models base=HuggingFaceTB/SmolLM2-135M \
     sft=experiments/runs/sft dpo=experiments/runs/dpo --baseline=sft --rm_experiment_dir=experiments/runs/rm
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from rlhf.data.prompts import Prompts, load_prompts
from rlhf.data.splits import Split, check_tokenizer, has_split, load_split
from rlhf.errors import UserError
from rlhf.evaluation import sampling_of
from rlhf.experiment.devices import make_fabric
from rlhf.experiment.fits import check_reward_model, check_split, check_vocabulary
from rlhf.files import write_json
from rlhf.flags import DeviceFlags, GenerationFlags, ModelFlags, launch
from rlhf.models.forward import unwrapped
from rlhf.models.loading import check_kind, load_policy, load_scorer, resolve, tokenizer_of
from rlhf.models.policy import Policy
from rlhf.paths import check_writable
from rlhf.reports import accuracy_of, interval_of, paired_p_value
from rlhf.rewards.models import RewardModel
from rlhf.rollouts import Samples, generate
from rlhf.trees.batches import cut
from rlhf.trees.forest import Forest, Tree
from rlhf.trees.rows import finetune_tree, halves, pair_tree


@dataclass(kw_only=True)
class EvaluateFlags(ModelFlags, GenerationFlags, DeviceFlags):
    """Evaluation."""

    data_dir: str
    """Folder written by a prepare_data.py."""
    models: list[str]
    """name=folder of each model: experiments, model folders or hub ids."""
    baseline: str | None = None
    """Name of the model that KL, win rate and implicit rewards are measured against; the first unless set."""
    rm_experiment_dir: str | None = None
    """Experiment (or model) of the reward model that scores the answers."""
    split: Literal["test", "validation", "train"] = "test"
    """Split to evaluate on."""
    num_prompts: int = 64
    """Prompts to answer; 0: all of the split."""
    num_rows: int = 256
    """Rows for perplexity and pairs for accuracies; 0: all of the split."""
    num_seeds: int = 3
    """Answers of each model to each prompt, each with a seed of its own."""
    num_shown: int = 3
    """Prompts whose answers are printed."""
    seed: int = 42
    """Seed of the sampling."""
    micro_batch_size: int = 8
    """Rows that go through a model at once."""
    rollout_mini_batch_size: int = 32
    """Answers that are sampled at once."""
    output: str | None = None
    """JSON file for all numbers and answers."""


@torch.no_grad()
def perplexity(policy: Policy, split, rows: range, size: int, device) -> float:
    """exp of the mean negative log-likelihood of the response tokens."""
    total, count = 0.0, 0
    for batch in cut(rows, micro_batch_size=size):
        forest = Forest([finetune_tree(split[i]) for i in batch]).to(device)
        total += policy(forest)[0].cpu().double().sum().item()
        count += forest.num_targets
    return math.exp(-total / max(1, count))


@torch.no_grad()
def pair_logps(policy: Policy, split, rows: range, size: int, device) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the chosen and the rejected responses, (N,) each."""
    parts = []
    for batch in cut(rows, micro_batch_size=size):
        forest = Forest([pair_tree(split[i]) for i in batch]).to(device)
        parts.append(forest.per_branch(policy(forest)[0]).cpu())
    return halves(torch.cat(parts))


@torch.no_grad()
def kl_per_response(samples: Samples, baseline: Policy, prompts: list[Tensor], flags: EvaluateFlags, device) -> Tensor:
    """(N,) log pi - log baseline of each sampled response, in nats: an unbiased estimate of its KL on average."""
    parts = []
    for batch in cut(range(len(prompts)), micro_batch_size=flags.rollout_mini_batch_size):
        forest = Forest([Tree.of(prompts[i], samples.response_ids[i].cpu()) for i in batch]).to(device)
        ref_logps, _ = baseline(forest, temperature=flags.temperature)
        own = torch.cat([samples.token_logps[i] for i in batch])
        parts.append(forest.per_branch(own - ref_logps).cpu())
    return torch.cat(parts)


def named_models(models: list[str]) -> dict[str, str]:
    """name=folder arguments as a dict.

    Raises:
        UserError: an argument without a name, or a name given twice.
    """
    if not models:
        raise UserError("--models is empty; give name=folder of one or more models")
    found: dict[str, str] = {}
    for argument in models:
        name, equals, source = argument.partition("=")
        if not equals or not name or not source:
            raise UserError(f"--models: {argument!r} is not of the form name=folder; write one name and one = for each")
        if name in found:
            raise UserError(f"--models: the name {name!r} is given twice; give each model its own")
        found[name] = resolve(source, "models")
    return found


def _check_fits(policy: Policy, tokenizer, prompts: Prompts, splits: dict[str, Split], flags: EvaluateFlags) -> None:
    check_vocabulary(tokenizer, unwrapped(policy.model))
    check_split(prompts.split, unwrapped(policy.model), new_tokens=flags.max_new_tokens)
    for split in splits.values():
        check_split(split, unwrapped(policy.model))


def main(flags: EvaluateFlags) -> dict:
    """Evaluate all models; returns the results by model name."""
    if flags.output and Path(flags.output).is_dir():
        raise UserError(f"--output={flags.output} is a folder; give the name of a JSON file")
    if flags.output:
        check_writable(Path(flags.output).parent, "output")
    sources = named_models(flags.models)
    baseline_name = flags.baseline or next(iter(sources))
    if baseline_name not in sources:
        raise UserError(f"--baseline={baseline_name} is none of the models ({', '.join(sources)}); give one of them")
    for source in sources.values():
        check_kind(source, flags)
    rm = resolve(flags.rm_experiment_dir, "rm_experiment_dir") if flags.rm_experiment_dir else None
    if rm:
        check_kind(rm, flags, scorer=True)
    fabric, why = make_fabric(flags)
    if fabric.world_size > 1:
        raise UserError("rlhf_evaluate runs on one device; set --devices=1")
    print(f"rlhf_evaluate: {why}", flush=True)
    device = fabric.device
    tokenizer = tokenizer_of(sources[baseline_name], flags)
    prompts = load_prompts(flags.data_dir, flags.split, tokenizer)
    if prompts is None:
        raise UserError(f"--data_dir={flags.data_dir} has no {flags.split} split; run a prepare_data.py that keeps one")
    splits = {
        stage: load_split(flags.data_dir, stage, flags.split)
        for stage in ("finetune", "preference")
        if has_split(flags.data_dir, stage, flags.split)
    }
    for split in splits.values():
        check_tokenizer(split, tokenizer)
    rows = {stage: range(min(flags.num_rows or len(split), len(split))) for stage, split in splits.items()}
    num_prompts = min(flags.num_prompts or len(prompts), len(prompts))
    questions = [prompts.prompt(i) for i in range(num_prompts) for _ in range(flags.num_seeds)]

    results: dict[str, dict] = {}
    reward = None
    if rm:
        scorer = fabric.to_device(load_scorer(rm, flags, trainable=False))
        reward = RewardModel(scorer, tokenizer_of(rm, flags), tokenizer, name=f"the reward model {rm}")
        if warning := check_reward_model(prompts, reward, flags.max_new_tokens):
            print(f"warning: {warning}", flush=True)
        if "preference" in splits and reward.same_tokenizer:
            with fabric.autocast():
                results["reward_model"] = reward_accuracy(reward, splits["preference"], rows["preference"], flags)
    baseline = fabric.to_device(load_policy(sources[baseline_name], flags, trainable=False))
    answers: dict[str, list[str]] = {}
    scores: dict[str, Tensor] = {}
    logps: dict[str, tuple[Tensor, Tensor]] = {}
    order = [baseline_name, *(name for name in sources if name != baseline_name)]
    for name in tqdm(order, desc="models"):
        is_baseline = name == baseline_name
        policy = baseline if is_baseline else fabric.to_device(load_policy(sources[name], flags, trainable=False))
        _check_fits(policy, tokenizer, prompts, splits, flags)
        found: dict = {"model": sources[name]}
        with fabric.autocast():
            if "finetune" in splits:
                found["perplexity"] = perplexity(
                    policy, splits["finetune"], rows["finetune"], flags.micro_batch_size, device
                )
            if "preference" in splits:
                logps[name] = pair_logps(
                    policy, splits["preference"], rows["preference"], flags.micro_batch_size, device
                )
                margins = [a - b for a, b in zip(logps[name], logps[baseline_name], strict=True)]
                if not is_baseline:
                    found["implicit_accuracy"] = accuracy_of(margins[0] > margins[1])
            samples = generate(
                policy,
                questions,
                sampling_of(flags, tokenizer, policy, seed=flags.seed),
                max_rows=flags.rollout_mini_batch_size,
            )
            kl = kl_per_response(samples, baseline, questions, flags, device)
            found["kl_to_baseline"] = interval_of(kl.view(num_prompts, -1).mean(1))
            found["response_length"] = sum(len(r) for r in samples.response_ids) / len(questions)
            found["eos_rate"] = samples.ended.double().mean().item()
            responses = [r.cpu() for r in samples.response_ids]
            if reward is not None:
                parts = [
                    reward([questions[i] for i in b], [responses[i] for i in b], [bool(samples.ended[i]) for i in b])
                    for b in cut(range(len(questions)), micro_batch_size=flags.rollout_mini_batch_size)
                ]
                scores[name] = torch.cat(parts).view(num_prompts, -1)
                found["reward"] = interval_of(scores[name].mean(1))
                found["reward_std"] = scores[name].std(correction=0).item()
                difference = scores[name] - scores[baseline_name]
                wins = ((difference > 0).double() + 0.5 * (difference == 0).double()).mean(1)
                found["win_rate"] = {**interval_of(wins, low=0.0, high=1.0), "p_value": paired_p_value(wins - 0.5)}
        answers[name] = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        results[name] = found
        del policy
    results = {name: results[name] for name in ("reward_model", *sources) if name in results}
    print(table_of(results, baseline_name))
    for i in range(min(flags.num_shown, num_prompts)):
        print(f"\n{'-' * 100}\n{tokenizer.decode(prompts.prompt(i), skip_special_tokens=True).strip()}")
        for name in sources:
            print(f"\n[{name}] {' '.join(answers[name][i * flags.num_seeds].split())}")
    if flags.output:
        write_json(flags.output, {"results": results, "answers": answers})
    return results


@torch.no_grad()
def reward_accuracy(reward: RewardModel, split, rows: range, flags: EvaluateFlags) -> dict:
    """How often the reward model scores the chosen response of a held-out pair higher."""
    chosen, rejected = [], []
    for batch in cut(rows, micro_batch_size=flags.micro_batch_size):
        forest = Forest([pair_tree(split[i]) for i in batch]).to(next(reward.scorer.parameters()).device)
        a, b = halves(reward.scorer(forest, forest.branch_last).cpu())
        chosen.append(a)
        rejected.append(b)
    return accuracy_of(torch.cat(chosen) > torch.cat(rejected))


def table_of(results: dict[str, dict], baseline: str) -> str:
    """The results as a Markdown table."""

    def shown(value: dict | float | None, percent: bool = False) -> str:
        if value is None:
            return "-"
        if not isinstance(value, dict):
            return f"{value:.2f}"
        middle = value.get("mean", value.get("accuracy"))
        low, high = value["interval"]
        if percent:
            return f"{100 * middle:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"

    lines = []
    if "reward_model" in results:
        found = results["reward_model"]
        lines.append(f"\nreward model: accuracy {shown(found, percent=True)} on {found['n']} held-out pairs\n")
    lines.append(
        f"| model | perplexity | reward | KL to {baseline}, nats | wins against {baseline} | implicit accuracy | "
        f"length | EOS |\n|---|---|---|---|---|---|---|---|"
    )
    for name, found in results.items():
        if name == "reward_model":
            continue
        lines.append(
            f"| {name} | {shown(found.get('perplexity'))} | {shown(found.get('reward'))} | "
            f"{shown(found['kl_to_baseline'])} | {shown(found.get('win_rate'), percent=True)} | "
            f"{shown(found.get('implicit_accuracy'), percent=True)} | {found['response_length']:.0f} | "
            f"{100 * found['eos_rate']:.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    launch(main, EvaluateFlags)
