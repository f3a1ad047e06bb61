#!/usr/bin/env bash
# The whole check: lint, format, then every test and doctest. Arguments go to pytest:
#     bash tests/run.sh
#     bash tests/run.sh -k dpo -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../experiments/setup.sh" test peer

setup_trl_with_ppo

echo "run.sh: ruff"
ruff check .
ruff format --check .

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RLHF_REQUIRE_PEERS=1
if [ "${CI:-}" = true ]; then
    export CUDA_VISIBLE_DEVICES=
fi
echo "run.sh: pytest"
exec pytest -n 2 tests rlhf "$@"
