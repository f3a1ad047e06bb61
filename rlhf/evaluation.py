"""What every script does at an evaluation: answer the data's example prompt with the model as it stands."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.prompts import example_prompt
from rlhf.experiment.run import Run
from rlhf.models.forward import unwrapped
from rlhf.models.policy import Policy
from rlhf.rollouts import Sampling, generate


def sampling_of(flags: Any, tokenizer: PreTrainedTokenizerBase, policy: Policy, *, seed: int = 0) -> Sampling:
    """The sampling that the generation flags ask for; it ends at the tokenizer's and the model's EOS tokens."""
    return Sampling(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        do_sample=flags.do_sample,
        stop_ids=stop_ids(tokenizer, policy),
        seed=seed,
    )


def stop_ids(tokenizer: PreTrainedTokenizerBase, policy: Policy) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's EOS and those of the model's generation settings."""
    settings = getattr(unwrapped(policy.model), "generation_config", None)
    listed = getattr(settings, "eos_token_id", None)
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    return tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None))


def log_sample(run: Run, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer the example prompt, on the first device, into samples.jsonl and onto the terminal."""
    prompt = example_prompt(run.flags.data_dir)
    if run.rank != 0 or prompt is None:
        return
    with run.fabric.autocast():
        samples = generate(
            policy, [prompt.to(run.device)], sampling_of(run.flags, tokenizer, policy, seed=run.flags.seed)
        )
    response = tokenizer.decode(samples.response_ids[0], skip_special_tokens=True)
    run.logs.write_samples(run.step_index, [{"prompt": tokenizer.decode(prompt), "response": response}])
    run.say(f"  sample after step {run.step_index}: {' '.join(response.split())[:200]}")
