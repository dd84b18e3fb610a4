#!/usr/bin/env bash
# One job of launch/slurm.sh: slurm_job.sh 'RUNS' COMMAND...
# Does the run that the number of this task in its array says, of none all that is left.
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

# To this script itself Slurm sends SIGTERM only when it ends the job, for good or to requeue it.
ended='' code=0
trap 'ended=1' TERM
"${job[@]}" || code=$?
# Warned by --signal, the processes saved and ended: with 130, or 143 if they had not begun to train.
if [[ ! $ended ]] && ((code == 130 || code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
