#!/usr/bin/env bash
# Speed and memory beside TRL: sets up both releases of it, and runs speed.py. Arguments are speed.py's:
#     bash experiments/benchmarks/speed.sh --model_name=HuggingFaceTB/SmolLM2-135M --data_file=pairs.jsonl.gz
#     bash experiments/benchmarks/speed.sh --model_name=models/smollm2-135m --data_dir=data/hh --stages sft dpo
set -euo pipefail
arguments=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" peer
setup_trl_with_ppo
export TOKENIZERS_PARALLELISM=false
exec python experiments/benchmarks/speed.py "${arguments[@]}"
