#!/usr/bin/env bash
# All runs of a config as jobs of Slurm: an array for those that can run at the same time, each
# array when the one before is complete, then the finetune with the comparison.
# From nothing to result: docs/slurm.md. Flags: launch/common.sh.
#
#   NODES=2 SBATCH_PARTITION=gpu launch/slurm.sh [--dry-run] --config=configs/mine.py --workdir=DIR
set -euo pipefail

nodes=${NODES:-1}  # of each job
gpus=${GPUS:-8}    # of each node, and processes, each with one of them; 0: no GPUs, one process

. "$(dirname "$0")/common.sh"

# --requeue: Slurm starts a preempted job again. --signal: five minutes before its time is up the
# processes, not the script, get SIGTERM, save and end; launch/slurm_job.sh then asks for more.
sbatch=(sbatch --parsable --requeue --signal=TERM@300 --open-mode=append --nodes="$nodes")
if ((gpus)); then
  sbatch+=(--ntasks-per-node="$gpus" --gpus-per-node="$gpus")
else
  sbatch+=(--ntasks-per-node=1)
fi

# STAGE OPTION...: submits a job, and says its id.
submit() {
  local job=("${sbatch[@]}" "${@:2}" "${after[@]}" launch/slurm_job.sh "$1" "${command[@]}")
  if [[ ! $dry_run ]]; then
    "${job[@]}" | cut -d';' -f1  # behind it may stand the cluster
    return
  fi
  quoted "${job[@]}" >&2
  local names i
  read -ra names <<< "${1:-''}"
  for i in "${!names[@]}"; do
    DRY_RUN=1 SLURM_ARRAY_TASK_ID=$i bash launch/slurm_job.sh "$1" "${command[@]}" >&2
  done
  echo "JOB$((${#after[@]} ? ${after[0]##*JOB} + 1 : 1))"
}

after=()
for stage in "${stages[@]}"; do
  read -ra names <<< "$stage"
  id=$(submit "$stage" --array="0-$((${#names[@]} - 1))" --job-name="${names[0]}")
  after=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
done
id=$(submit '' --job-name=btx)
echo "the last job is $id"
