#!/usr/bin/env bash
# Retrieve, then rank: a retriever and LlamaRec on its candidates, MovieLens latest-small, 5-core.
#
#   launch/recipes/ml-latest-small/llamarec.sh [flags of the ranker]
#   RETRIEVER=sasrec SEED=1 launch/recipes/ml-latest-small/llamarec.sh --backbone.name FOLDER
#
# A stage that is finished is not trained again.
set -euo pipefail
cd "$(dirname "$0")/../../.."
retriever=${RETRIEVER:-sasrec}
seed=${SEED:-42}
first=runs/ml-latest-small-$retriever-seed$seed
accelerate launch launch/train.py --recipe "launch/recipes/ml-latest-small/$retriever.yaml" --train.seed "$seed" \
    --output "$first"
accelerate launch launch/train.py --recipe launch/recipes/ml-latest-small/llamarec.yaml --train.seed "$seed" \
    --method.retriever "$first" --output "runs/ml-latest-small-llamarec-seed$seed" "$@"
