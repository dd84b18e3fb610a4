#!/usr/bin/env bash
# All runs of a config on the GPUs of one node, or on fake devices if it has none.
# Step by step: docs/gpu_node.md. Flags: launch/common.sh.
#
#   EXPERTS=apart launch/gpu_node.sh [--dry-run] --config=configs/mine.py
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

experts=${EXPERTS:-in_turn}  # 'in_turn': each on all GPUs; 'apart': at the same time, each on its
                             # share of them; 'stacked': expert/* in one program (config.stacked)
# The GPUs in CUDA_VISIBLE_DEVICES, or else all GPUs; only the first $GPUS of them if that is set.
visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)}
IFS=$' ,\n' read -rd '' -a visible <<< "$visible" || true
gpus=${GPUS:-${#visible[@]}}
[[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || fail "GPUS=$gpus is not a number of GPUs"
if ((gpus > ${#visible[@]})); then
  [[ $dry_run || ${JAX_PLATFORMS:-} == cpu ]] || fail "GPUS=$gpus, but there are ${#visible[@]}"
  visible=()
fi
fake='' stacked=''
if [[ $gpus == 0 || ${JAX_PLATFORMS:-} == cpu ]]; then
  fake=1 gpus=${JAX_NUM_CPU_DEVICES:-8}
  # XLA needs at least as many threads as devices, or they can wait for each other forever.
  run export JAX_PLATFORMS=cpu NPROC="${NPROC:-32}"
fi
run . launch/env.sh

# FIRST COUNT COMMAND...: runs a command on COUNT devices, from number FIRST on.
on() {
  local devices taken=("${visible[@]:$1:$2}")
  [[ ${visible[*]} ]] || mapfile -t taken < <(seq "$1" $(($1 + $2 - 1)))
  devices=CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${taken[*]}")
  [[ ! $fake ]] || devices=JAX_NUM_CPU_DEVICES=$2
  run env "$devices" "${@:3}"
}

# RUN: trains it on its share, by its position in `now`; without a name, all runs that are left.
job() {
  local i=0
  if [[ ! $1 ]]; then
    on 0 "$gpus" "${command[@]}"
    return
  fi
  while [[ ${now[i]} != "$1" ]]; do i=$((i + 1)); done
  on $((i * share)) "$share" "${command[@]}" --run="$1"
}

case $experts in
  in_turn) ;;
  apart)
    for stage in "${stages[@]}"; do
      read -ra names <<< "$stage"
      most=$((${#names[@]} < gpus ? ${#names[@]} : gpus))
      share=$((gpus / most))
      for ((first = 0; first < ${#names[@]}; first += most)); do
        now=("${names[@]:first:most}")
        each job "${now[@]}"
      done
    done
    ;;
  stacked)
    read -ra names <<< "${stages[*]}"
    for name in "${names[@]}"; do
      [[ ! $name =~ ^seed-[0-9]+/ ]] || name=${name#*/}  # config.stacked has it once for all seeds
      [[ $name != expert/* || $stacked == *"'$name', "* ]] || stacked+="'$name', "
    done
    [[ $stacked ]] || fail "EXPERTS=stacked needs runs called expert/*; there are only: ${names[*]}"
    command+=("--config.stacked=(${stacked% })")
    ;;
  *) fail "EXPERTS=$experts; valid: in_turn, apart, stacked" ;;
esac
each job ''
