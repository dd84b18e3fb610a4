#!/usr/bin/env bash
# All runs of a config as JobSets on TPU slices of a GKE cluster: stage by stage, the runs of a
# stage at the same time, then the finetune with the comparison.
# Step by step: docs/gke.md. Flags: launch/common.sh.
#
#   IMAGE=us-docker.pkg.dev/mine/btx/btx_jax \
#       launch/gke.sh [--dry-run] --config=configs/mine.py --workdir=gs://BUCKET/mine
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
check_remote_flags

# The variables in launch/gke_jobset.yaml.
export IMAGE=${IMAGE:?an image with this repository as its working directory}
export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4}
export HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4}  # hosts of such a slice; chips of each host
prefix=${PREFIX:-btx}                       # JobSets are called PREFIX-RUN
check_names_of_runs "$prefix"

# RUN: trains it and waits until it ends; without a name, all runs that are left.
job() {
  local key ended name text words=("${command[@]}" --distributed ${1:+--run="$1"})
  name_of "$prefix" "${1:-all}"
  # Prints how it ended; nothing while it runs, or if it does not exist.
  local ask=(kubectl get jobset "$name" --ignore-not-found --output='jsonpath={.status.terminalState}')
  text=$(< launch/gke_jobset.yaml)
  text=${text//"\${NAME}"/"$name"}
  for key in IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS; do
    text=${text//"\${$key}"/"${!key}"}
  done
  text=${text//"\${COMMAND}"/"$(quoted "${words[@]}")"}  # last: nothing in it is a variable
  if [[ $dry_run ]]; then
    printf "kubectl apply -f - <<'JOBSET'\n%s\nJOBSET\n" "$text"
    quoted "${ask[@]}"
    return
  fi
  # A failed JobSet must be deleted to start again; `apply` does not touch one that still runs.
  ended=$("${ask[@]}")
  if [[ $ended == Completed ]]; then
    echo "$name: Completed already; to repeat it, first kubectl delete jobset $name"
    return
  fi
  [[ ! $ended ]] || kubectl delete jobset "$name"
  kubectl apply -f - <<< "$text"
  until ended=$("${ask[@]}") && [[ $ended ]]; do sleep 30; done
  echo "$name: $ended"
  [[ $ended == Completed ]]
}

for stage in "${stages[@]}"; do
  read -ra names <<< "$stage"
  each job "${names[@]}"
done
each job ''
