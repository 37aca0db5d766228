#!/usr/bin/env bash
# UR4Rec on MovieLens 1M: the pipeline of ../ml-100k/ur4rec.sh with the data and the width of this folder's sasrec.yaml, and fewer
# texts of each user. No result of these settings yet; docs/methods/ur4rec.md has one of shorter runs.
#   RANKER=sasrec WRITER=Qwen/Qwen2.5-7B-Instruct launch/recipes/ml-1m/ur4rec.sh [flags for every run]
set -euo pipefail
export SOURCE=ml-1m DATA="--data.item_core 5" WIDTH=128 EVERY=50
exec "$(dirname "$0")/../ml-100k/ur4rec.sh" "$@"
