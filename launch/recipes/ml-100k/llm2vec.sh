#!/usr/bin/env bash
# LLM2Vec on MovieLens 100K: masked next-token prediction, SimCSE, then dense retrieval, each from the backbone of the one
# before. Started again, it goes on where it was stopped. No result yet.
#   launch/recipes/ml-100k/llm2vec.sh [flags for every run, such as --train.seed 1]
set -euo pipefail
cd "$(dirname "$0")/../../.."

train() { # model, then flags
    accelerate launch launch/train.py --model "$1" --data.source ml-100k --output "runs/ml-100k-$1" "${@:2}"
}
export_backbone() { # model
    [[ -d "runs/ml-100k-$1-backbone" ]] || python launch/export.py --run "runs/ml-100k-$1" --to "runs/ml-100k-$1-backbone"
}

train mntp "$@"
export_backbone mntp
train simcse "$@"
export_backbone simcse
train dense-retrieval --backbone.name runs/ml-100k-simcse-backbone --backbone.adapter none "$@"
