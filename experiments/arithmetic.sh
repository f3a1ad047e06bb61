#!/usr/bin/env bash
# Arithmetic with answers that are checked: GRPO and RLOO side by side, from an instruction-tuned model as it is; with the
# stage sft, from worked answers learnt first (a policy so sure of itself that few groups are left to learn from).
#     bash experiments/arithmetic.sh
#     LEVELS="2 3" STAGES="prepare sft grpo" bash experiments/arithmetic.sh --micro_batch_tokens=8192
# val/score in each metrics.jsonl is the share of held-out problems that are right, val/score_error half the width of its
# 95 % interval. experiments/stages.sh lists what can be set, LEVELS besides (1 to 5), and the flags of single stages
# (GRPO_FLAGS, RLOO_FLAGS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=arithmetic
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
STAGES=${STAGES:-prepare grpo rloo}
unset DATA
source experiments/stages.sh

for stage in finetune prompts; do
    prepare arithmetic $stage --levels ${LEVELS:-1 2} --num_problems=4000 --validation_percentage=0.25
done

train sft --model_name="$MODEL" --learning_rate=2e-5 --max_steps=60 --mini_batch_size=16 --max_new_tokens=32

policy=(--model_name="$MODEL")
[[ " $STAGES " != *" sft "* ]] || policy=(--sft_experiment_dir="$OUT/sft")

train grpo "${policy[@]}" --reward numeric --num_samples=8 --rollout_size=8 --max_new_tokens=32 \
    --learning_rate=5e-6 --max_steps=60 --eval_interval=15 --eval_iters=60

SCRIPT=grpo train rloo "${policy[@]}" --reward numeric --num_samples=8 --rollout_size=8 \
    --max_new_tokens=32 --learning_rate=5e-6 --max_steps=60 --eval_interval=15 --eval_iters=60 --advantage=rloo \
    --loss_normalization=constant --kl_coef=0.05 --kl_in=reward
