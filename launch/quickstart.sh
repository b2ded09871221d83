#!/usr/bin/env bash
# The whole path on real data, on 2 processes of this machine: set up, write shards, train, evaluate, sample, report.
# Run it again: it continues where it stopped, or says that the run is complete.
#
#   bash launch/quickstart.sh [--section.key value ...]     settings of the training run
#
# JMVAE_DIST_WORKDIR   where data/ and runs/ go (default: the repository)
set -euo pipefail

# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
export PATH="$venv/bin:$PATH" PYTHON="$venv/bin/python"
work=${JMVAE_DIST_WORKDIR:-$root}
data=$work/data/digits
run=$work/runs/digits

step() {
    printf '\n== %s\n' "$1"
}

step "Shards: scikit-learn's digits, 80 % to train, 20 % held out"
jmvae-dist shards write digits --split train --out "$data/train"
jmvae-dist shards write digits --split test --out "$data/test"

step "Training on 2 processes (the same launcher as for your own runs)"
bash "$root/launch/local.sh" 2 train --config "$root/configs/digits.yaml" "$@" --output_dir "$run" \
    --data.train_manifest "$data/train/manifest.json" --data.eval_manifest "$data/test/manifest.json"

step "Evaluation of the held-out shards on 2 processes"
bash "$root/launch/local.sh" 2 evaluate "$run" --manifest "$data/test/manifest.json" --out "$run/evaluation.json"

step "Samples: images from labels, and from the prior"
jmvae-dist sample "$run" --given label --manifest "$data/test/manifest.json" --out "$run/samples/given_label"
jmvae-dist sample "$run" --out "$run/samples/prior"

step "What was learned"
jmvae-dist report "$run"
