#!/usr/bin/env bash
# All runs of a config as jobs of Slurm: an array for those that can run at the same time, each
# array when the one before is complete, then the finetune with the comparison.
# From nothing to result: docs/slurm.md. Flags: launch/common.sh.
#
#   NODES=2 SBATCH_PARTITION=gpu launch/slurm.sh [--dry-run] --config=configs/mine.py --workdir=DIR
set -euo pipefail

nodes=${NODES:-1}  # of each job
gpus=${GPUS:-8}    # of each node, and processes, each with one of them; 0: no GPUs, one process

cd "$(dirname "$0")/.."
. launch/common.sh

# --requeue: Slurm starts a preempted job again. --signal: five minutes before its time is up the
# processes, not the script, get SIGTERM, save and end; launch/slurm_job.sh then asks for more.
sbatch=(sbatch --parsable --requeue --signal=TERM@300 --open-mode=append --nodes="$nodes")
if ((gpus)); then
  sbatch+=(--ntasks-per-node="$gpus" --gpus-per-node="$gpus")
else
  sbatch+=(--ntasks-per-node=1)
fi

# STAGE OPTION...: submits a job, to begin when the one before is complete.
id='' jobs=0
submit() {
  local i names job=("${sbatch[@]}" "${@:2}")
  [[ ! $id ]] || job+=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
  job+=(launch/slurm_job.sh "$1" "${command[@]}")
  if [[ ! $dry_run ]]; then
    id=$("${job[@]}" | cut -d';' -f1)  # behind it may stand the cluster
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
[[ $dry_run ]] || echo "${#stages[@]} array(s) submitted, and at last job $id"
