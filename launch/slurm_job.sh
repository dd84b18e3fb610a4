#!/usr/bin/env bash
# One job of launch/slurm.sh: slurm_job.sh 'RUNS' COMMAND...
# Trains the run at the position of this task in its array; if RUNS is empty, all that are left.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"  # Slurm runs a copy of this file
. launch/env.sh

read -ra runs <<< "$1"
job=(srun "${@:2}" --distributed)
((${#runs[@]} == 0)) || job+=(--run="${runs[SLURM_ARRAY_TASK_ID]}")
if [[ ${DRY_RUN:-} ]]; then
  printf '%s\n' "${job[@]}"
  exit
fi

# Slurm sends SIGTERM to this script itself only to end the job, for good or to requeue it.
ended='' code=0
trap 'ended=1' TERM
"${job[@]}" || code=$?
# After the warning of --signal the processes saved and exited: with 130, or 143 before training.
if [[ ! $ended ]] && ((code == 130 || code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
