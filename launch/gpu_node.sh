#!/usr/bin/env bash
# All runs of a config on the GPUs of one node, or on fake devices where there are none.
# From nothing to result: docs/gpu_node.md. Flags: launch/common.sh.
#
#   EXPERTS=apart launch/gpu_node.sh [--dry-run] --config=configs/mine.py
set -euo pipefail

experts=${EXPERTS:-in_turn}  # 'in_turn', each over all GPUs; 'apart', each on its share of them at
                             # the same time; 'stacked', as one program (config.stacked)
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}  # without any: 8 fake devices
[[ $gpus != 0 ]] || export JAX_PLATFORMS=cpu
if [[ ${JAX_PLATFORMS:-} == cpu ]]; then
  gpus=${JAX_NUM_CPU_DEVICES:-8}
  export NPROC="${NPROC:-32}"  # threads of XLA: fewer than devices can wait for each other forever
fi

. "$(dirname "$0")/common.sh"
. launch/env.sh

# The devices from FIRST on, COUNT of them, as an environment.
devices() {
  if [[ ${JAX_PLATFORMS:-} == cpu ]]; then
    echo "JAX_NUM_CPU_DEVICES=$2"
  else
    echo "CUDA_VISIBLE_DEVICES=$(seq -s, "$1" $(($1 + $2 - 1)))"
  fi
}

# A run on its share, by its place among those that run at the same time.
on_share() {
  local i
  for i in "${!now[@]}"; do [[ ${now[i]} == "$1" ]] && break; done
  run env "$(devices $((i * share)) "$share")" "${command[@]}" --run="$1"
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
        each on_share "${now[@]}"
      done
    done
    ;;
  stacked)
    for stage in "${stages[@]}"; do
      [[ $stage == *' '* ]] || continue
      command+=("--config.stacked=('${stage// /"','"}',)")
      break
    done
    ;;
  *) fail "EXPERTS=$experts; valid: in_turn, apart, stacked" ;;
esac
run env "$(devices 0 "$gpus")" "${command[@]}"
