#!/usr/bin/env bash
# All runs of a config as JobSets on TPU slices of a GKE cluster: those that can run at the same
# time at once, then the finetune with the comparison.
# From nothing to result: docs/gke.md. Flags: launch/common.sh.
#
#   IMAGE=us-docker.pkg.dev/mine/btx/btx_jax \
#       launch/gke.sh [--dry-run] --config=configs/mine.py --workdir=/mnt/btx/mine
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
to_be_sent

# What stands in launch/gke_jobset.yaml.
export IMAGE=${IMAGE:?an image with this repository as its working directory}
export ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4}
export HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4}  # of a slice of that topology; chips of each host
export CLAIM=${CLAIM:-btx}                  # of the volume that is mounted at /mnt/btx
prefix=${PREFIX:-btx}                       # JobSets are called PREFIX-RUN

# RUN: does it, and waits for its end; all that is left, where there is no name.
job() {
  local key ended name=$prefix-${1:-all} text words=("${command[@]}" --distributed ${1:+--run="$1"})
  name=${name,,} name=${name//[^a-z0-9-]/-}
  # Says how it ended; nothing while it runs, or if there is none.
  local ask=(kubectl get jobset "$name" --ignore-not-found --output='jsonpath={.status.terminalState}')
  text=$(< launch/gke_jobset.yaml)
  text=${text//"\${NAME}"/"$name"} text=${text//"\${COMMAND}"/"$(quoted "${words[@]}")"}
  for key in IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS CLAIM; do
    text=${text//"\${$key}"/"${!key}"}
  done
  if [[ $dry_run ]]; then
    printf "kubectl apply -f - <<'JOBSET'\n%s\nJOBSET\n" "$text"
    quoted "${ask[@]}"
    return
  fi
  # One that has failed does not start again; one that still runs is left alone by `apply`.
  ended=$("${ask[@]}")
  if [[ $ended == Completed ]]; then
    echo "$name: Completed before; to do it anew: kubectl delete jobset $name"
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
