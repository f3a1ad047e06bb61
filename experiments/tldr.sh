#!/usr/bin/env bash
# Reddit posts and their summaries (CarperAI/openai_summarize_*): SFT, reward model, PPO, DPO, KTO, evaluation.
#     bash experiments/tldr.sh
#     MODEL=EleutherAI/pythia-1b-deduped DEVICES=8 bash experiments/tldr.sh --micro_batch_size=8
#     DATA=sample STAGES="prepare sft dpo" bash experiments/tldr.sh --max_steps=20
# Lengths, rates, temperature and PPO's settings are those of "The N+ Implementation Details of RLHF with PPO" (arXiv
# 2403.17031), at smaller batches. experiments/stages.sh lists what can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=tldr
MODEL=${MODEL:-EleutherAI/pythia-160m-deduped}
source experiments/stages.sh

prepare summarization finetune --max_length=565 --max_prompt_length=512 --max_response_length=53
prepare summarization preference --max_length=681 --max_prompt_length=512 --max_response_length=169
prepare summarization feedback --max_length=681 --max_prompt_length=512 --max_response_length=169

train sft --model_name="$MODEL" --learning_rate=3e-6 --epochs=1 --mini_batch_size=32 --max_new_tokens=53 \
    --eval_interval=500 --save_interval=1000

train rm --sft_experiment_dir="$OUT/sft" --learning_rate=3e-6 --epochs=1 --mini_batch_size=32 --lr_schedule=cosine \
    --eval_interval=500 --save_interval=1000

train ppo --sft_experiment_dir="$OUT/sft" --rm_experiment_dir="$OUT/rm" --rollout_size=128 --mini_batch_size=128 \
    --ppo_epochs=4 --max_new_tokens=53 --temperature=0.7 --max_steps=1000 --actor_learning_rate=3e-6 \
    --critic_learning_rate=3e-6 --init_kl_coeff=0.05 --eval_interval=50 --save_interval=100

train dpo --sft_experiment_dir="$OUT/sft" --learning_rate=1e-6 --beta=0.05 --epochs=1 --mini_batch_size=32 \
    --lr_warmup_steps=100 --max_new_tokens=53 --eval_interval=500 --save_interval=1000

train kto --sft_experiment_dir="$OUT/sft" --learning_rate=1e-6 --beta=0.1 --epochs=1 --mini_batch_size=64 \
    --lr_warmup_steps=100 --max_new_tokens=53 --eval_interval=500 --save_interval=1000

evaluate --num_prompts=256 --num_rows=1000 --num_seeds=3 --max_new_tokens=53 --temperature=0.7
