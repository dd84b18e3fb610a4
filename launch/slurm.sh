#!/usr/bin/env bash
# All runs of a config as Slurm jobs: an array for each stage, which starts once the one before it
# is complete, then the finetune with the comparison.
# Step by step: docs/slurm.md. Flags: launch/common.sh.
#
#   NODES=2 SBATCH_PARTITION=gpu launch/slurm.sh [--dry-run] --config=configs/mine.py --workdir=DIR
set -euo pipefail

nodes=${NODES:-1}  # of each job
gpus=${GPUS:-8}    # of each node, with one process for each; 0: no GPUs, one process

cd "$(dirname "$0")/.."
. launch/common.sh

# --requeue: Slurm restarts a preempted job. --signal: five minutes before the time limit the
# processes, not the script, get SIGTERM, save and end; launch/slurm_job.sh then requeues the job.
sbatch=(sbatch --parsable --requeue --signal=TERM@300 --open-mode=append --nodes="$nodes")
if ((gpus)); then
  sbatch+=(--ntasks-per-node="$gpus" --gpus-per-node="$gpus")
else
  sbatch+=(--ntasks-per-node=1)
fi

# STAGE OPTION...: submits a job that starts once the one before it is complete.
id='' jobs=0
submit() {
  local i names job=("${sbatch[@]}" "${@:2}")
  [[ ! $id ]] || job+=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
  job+=(launch/slurm_job.sh "$1" "${command[@]}")
  if [[ ! $dry_run ]]; then
    id=$("${job[@]}" | cut -d';' -f1)  # the cluster may follow it
    return
  fi
  quoted "${job[@]}"
  id=JOB$((jobs += 1))
  read -ra names <<< "${1:-all}"
  for i in "${!names[@]}"; do
    mapfile -t job < <(DRY_RUN=1 SLURM_ARRAY_TASK_ID=$i launch/slurm_job.sh "$1" "${command[@]}")
    quoted "${job[@]}"
  done
}

for stage in "${stages[@]}"; do
  read -ra names <<< "$stage"
  submit "$stage" --array="0-$((${#names[@]} - 1))" --job-name="${names[0]}"
done
submit '' --job-name=btx
[[ $dry_run ]] || echo "${#stages[@]} array(s) submitted, then job $id"
