#!/usr/bin/env bash
# Helpful and harmless dialogues (Anthropic/hh-rlhf): SFT, reward model, PPO, DPO, KTO, evaluation.
#     bash experiments/hh.sh
#     MODEL=HuggingFaceTB/SmolLM2-360M DEVICES=8 bash experiments/hh.sh --micro_batch_size=16
#     DATA=sample STAGES="prepare sft dpo" bash experiments/hh.sh --max_steps=20
# experiments/stages.sh lists what can be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=hh
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M}
source experiments/stages.sh

for stage in finetune preference feedback; do
    prepare helpful_harmless $stage --max_length=512 --max_prompt_length=384 --test_percentage=0.02 \
        --validation_percentage=0.02
done

train sft --model_name="$MODEL" --learning_rate=1e-5 --epochs=1 --mini_batch_size=32 --lr_warmup_steps=100 \
    --eval_interval=500 --save_interval=1000

train rm --sft_experiment_dir="$OUT/sft" --learning_rate=1e-5 --epochs=1 --mini_batch_size=32 --lr_warmup_steps=100 \
    --eval_interval=500 --save_interval=1000

train ppo --sft_experiment_dir="$OUT/sft" --rm_experiment_dir="$OUT/rm" --rollout_size=64 --mini_batch_size=64 \
    --ppo_epochs=4 --max_new_tokens=128 --max_steps=1000 --actor_learning_rate=1e-6 --critic_learning_rate=3e-6 \
    --init_kl_coeff=0.05 --eval_interval=50 --save_interval=100

train dpo --sft_experiment_dir="$OUT/sft" --learning_rate=1e-6 --beta=0.1 --epochs=1 --mini_batch_size=32 \
    --lr_warmup_steps=100 --eval_interval=500 --save_interval=1000

train kto --sft_experiment_dir="$OUT/sft" --learning_rate=1e-6 --beta=0.1 --epochs=1 --mini_batch_size=64 \
    --lr_warmup_steps=100 --eval_interval=500 --save_interval=1000

evaluate --num_prompts=256 --num_rows=1000 --num_seeds=3 --max_new_tokens=128
