#!/usr/bin/env bash
# Retrieve, then rank: a retriever and LlamaRec on its candidates, MovieLens latest-small, 5-core.
#
#   launch/recipes/ml-latest-small/llamarec.sh [flags of the ranker]
#   RANKER=llamarec-letters SEED=1 launch/recipes/ml-latest-small/llamarec.sh --backbone.name FOLDER
#
# RETRIEVER and RANKER are recipes beside this file. A stage that is finished is not trained again.
set -euo pipefail
retriever=${RETRIEVER:-sasrec} ranker=${RANKER:-llamarec} seed=${SEED:-42}
cd "$(dirname "$0")/../../.."
recipes=launch/recipes/ml-latest-small
first=runs/ml-latest-small-$retriever-seed$seed
accelerate launch launch/train.py --recipe "$recipes/$retriever.yaml" --train.seed "$seed" --output "$first"
accelerate launch launch/train.py --recipe "$recipes/$ranker.yaml" --train.seed "$seed" --method.retriever "$first" \
    --output "runs/ml-latest-small-$ranker-of-$retriever-seed$seed" "$@"
