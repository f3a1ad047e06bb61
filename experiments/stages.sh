# Sourced by the whole runs of experiments/: what they share. The caller has set NAME (of the run) and MODEL.
#
# In the environment:
#     MODEL      hub id or folder of the pretrained model
#     DATA       local file or folder in the schema of the data set, or the word sample; the hub unless set
#     OUT        where everything goes (experiments/runs/NAME)
#     STAGES     which stages to run (prepare sft rm ppo dpo kto evaluate)
#     DEVICES, ACCELERATOR     more than one device is launched by `fabric run` with DDP (1, auto)
#     SFT_FLAGS, RM_FLAGS, PPO_FLAGS, DPO_FLAGS, KTO_FLAGS, EVALUATE_FLAGS     more flags for one stage
#     DRY_RUN    not empty: print the commands, run nothing
# Flags of the command line go to all training scripts, after their own: the last one counts.
# A stage that has finished is passed over, and one that was interrupted goes on from its last checkpoint.

OUT=${OUT:-experiments/runs/$NAME}
STAGES=${STAGES:-prepare sft rm ppo dpo kto evaluate}
DEVICES=${DEVICES:-1}
ACCELERATOR=${ACCELERATOR:-auto}
if [ -z "${DRY_RUN:-}" ]; then
    source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
fi
data=$OUT/data

# Print a command, and run it.
run() {
    echo "+ $(printf '%q ' "$@")"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# prepare SCRIPT STAGE FLAGS...: one stage of the data, unless it is there.
prepare() {
    local script=$1 stage=$2
    shift 2
    [[ " $STAGES " == *" prepare "* ]] || return 0
    [ ! -f "$data/${stage}_train.pt" ] || return 0
    run python "data_prep/$script/prepare_data.py" --destination_dir="$data" --tokenizer_name="$MODEL" \
        --stage="$stage" ${DATA:+--dataset_path="$DATA"} "$@"
}

# train STAGE FLAGS...: one training script into $OUT/STAGE, unless it has finished. $SCRIPT names the script where it
# is not that of the stage.
train() {
    local stage=$1 more
    shift
    [[ " $STAGES " == *" $stage "* ]] || return 0
    [ ! -f "$OUT/$stage/summary.json" ] || return 0
    more="${stage^^}_FLAGS"
    set -- "rlhf/rlhf_${SCRIPT:-$stage}.py" --data_dir="$data" --experiment_dir="$OUT/$stage" "$@" "${extra[@]}" ${!more:-}
    [ ! -d "$OUT/$stage" ] || set -- "$@" --resume=True
    if [ "$DEVICES" = 1 ]; then
        run python "$@"
    else
        run fabric run --accelerator="$ACCELERATOR" --devices="$DEVICES" --strategy=ddp "$@"
    fi
}

# evaluate FLAGS...: base, SFT, PPO, DPO and KTO side by side.
evaluate() {
    [[ " $STAGES " == *" evaluate "* ]] || return 0
    run python rlhf/rlhf_evaluate.py --data_dir="$data" --models base="$MODEL" sft="$OUT/sft" ppo="$OUT/ppo" \
        dpo="$OUT/dpo" kto="$OUT/kto" --baseline=sft --rm_experiment_dir="$OUT/rm" --output="$OUT/evaluation.json" "$@" \
        ${EVALUATE_FLAGS:-}
}

extra=("$@")
