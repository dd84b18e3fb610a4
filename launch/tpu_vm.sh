#!/usr/bin/env bash
# All runs of a config on Cloud TPU VMs, a slice for each: stage by stage, the runs of a stage at
# the same time, then the finetune with the comparison on one more slice.
# Step by step: docs/tpu_vm.md. Flags: launch/common.sh.
#
#   ZONE=us-east5-b DELETE=1 \
#       launch/tpu_vm.sh [--dry-run] --config=configs/mine.py --workdir=gs://BUCKET/mine
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
check_remote_flags

zone=${ZONE:?the zone of the slices, like us-east5-b}
type=${TYPE:-v5litepod-16}             # accelerator type of a slice
version=${VERSION:-v2-alpha-tpuv5-lite}  # its runtime version
prefix=${PREFIX:-btx}                  # slices are called PREFIX-RUN
check_names_of_runs "$prefix"
extras=${EXTRAS:-tpu,gcs}              # of the package, like tpu,gcs,demo,hf
queued=${QUEUED:-}                     # 1: queued resources; slices start as there is capacity
network=${NETWORK:-}                   # of the slices; empty: the default one of the project
spot=${SPOT:-}                         # 1: spot slices, which are cheaper and can be preempted
delete=${DELETE:-}                     # 1: delete a slice when its run is complete

uv=0.13.9  # installs the package

tpus=(gcloud compute tpus)
setup='mkdir -p btx_jax && tar -xzf btx_jax.tgz -C btx_jax && cd btx_jax'
# The text in single quotes is expanded by the shell of the host.
setup+=" && curl --proto '=https' --tlsv1.2 -LsSf https://astral.sh/uv/$uv/install.sh -o uv.sh"
# shellcheck disable=SC2016
setup+=' && sh uv.sh && PATH=$HOME/.local/bin:$PATH'
quoted_extras=.[$extras] quoted_extras=${quoted_extras@Q}
setup+=" && uv venv --allow-existing --python=3.12 && uv pip install -e $quoted_extras"

environment='cd btx_jax && . .venv/bin/activate && . launch/env.sh'

# SLICE: creates it, unless it exists already.
create() {
  local what=(tpu-vm create "$1" --version="$version") state=''
  [[ ! $queued ]] || what=(queued-resources create "$1" --node-id="$1" --runtime-version="$version")
  if [[ ! $dry_run ]]; then
    state=$("${tpus[@]}" tpu-vm list --zone="$zone" --filter="name~/$1\$" --format='value(state)')
    [[ $state != READY ]] || return 0
    [[ ! $state ]] || remove "$1"  # it was preempted
    if [[ $queued && ! $state ]]; then
      state=$("${tpus[@]}" queued-resources list --zone="$zone" --filter="name~/$1\$" \
        --format='value(state.state)')
      case $state in
        '') ;;
        FAILED | SUSPENDED) remove "$1" ;;
        *) wait_until_active "$1"; return ;;  # it was requested earlier
      esac
    fi
  fi
  run "${tpus[@]}" "${what[@]}" --zone="$zone" --accelerator-type="$type" ${spot:+--spot} \
    ${network:+--network="$network"}
  [[ ! $queued ]] || wait_until_active "$1"
}

# SLICE: waits until its turn in the queue has come.
wait_until_active() {
  local state='' ask=("${tpus[@]}" queued-resources describe "$1" --zone="$zone")
  ask+=(--format='value(state.state)')
  [[ ! $dry_run ]] || run "${ask[@]}"
  until [[ $dry_run || $state == ACTIVE ]]; do
    sleep 30
    state=$("${ask[@]}")
    [[ $state != FAILED && $state != SUSPENDED ]] || fail "$1 is $state"
  done
}

# SLICE: deletes it.
remove() {
  if [[ $queued ]]; then
    run "${tpus[@]}" queued-resources delete "$1" --zone="$zone" --force --quiet
  else
    run "${tpus[@]}" tpu-vm delete "$1" --zone="$zone" --quiet
  fi
}

# RUN: trains it on a slice of its own; without a name, all runs that are left.
job() {
  local name words=("${command[@]}" --distributed ${1:+--run="$1"})
  name_of "$prefix" "${1:-all}"
  create "$name"
  run "${tpus[@]}" tpu-vm scp "$package" "$name:btx_jax.tgz" --zone="$zone" --worker=all
  run "${tpus[@]}" tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$setup"
  run "${tpus[@]}" tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="$environment && $(quoted "${words[@]}")"
  [[ ! $delete ]] || remove "$name"
}

package=btx_jax.tgz
if [[ ! $dry_run ]]; then
  # A name in a shared folder that another user cannot have prepared, nor another launch replace.
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  package=$folder/$package
fi
run tar -czf "$package" pyproject.toml README.md LICENSE btx_jax configs launch
for stage in "${stages[@]}"; do
  read -ra names <<< "$stage"
  each job "${names[@]}"
done
each job ''
