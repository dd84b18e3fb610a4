# shellcheck shell=bash
# Shared by the launchers, which source it in the root of the repository with their arguments:
#
#   --dry-run   prints the commands that would be run, one per line, and runs nothing
#   --help      prints the comment at the top of the script
#   --one-job   trains all runs in one job, in order, and those in config.stacked together
#   the rest    goes to the command: --config=..., --workdir=..., --config.train.batch_size=...
#
# Sets
#
#   command     python -m btx_jax.main with its flags; run again, it continues where it stopped
#   stages      names of runs: those in one entry can be jobs at the same time, once those in
#               earlier entries are complete. A run that is not in it (at most one, the finetune) is
#               left to the command without --run, which also compares all models.

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Prints words so that a shell reads them back, in quotes if they need them.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# Runs a command, or with --dry-run only prints it.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# FUNCTION NAME...: calls a function for each name, all at the same time; fails if one of them does.
each() {
  local name id failed='' ids=()
  for name in "${@:2}"; do
    if [[ $dry_run ]]; then
      "$1" "$name"
      continue
    fi
    set -m  # a process group of its own, so that it can be ended as a whole
    (trap : TERM && "$1" "$name") &  # this shell outlives the command that it runs
    set +m
    ids+=($!)
  done
  # Ctrl-C also reaches them as SIGTERM, on which the command saves.
  trap 'kill -- "${ids[@]/#/-}" 2>/dev/null; wait; exit 130' INT TERM
  for id in "${ids[@]}"; do wait "$id" || failed=1; done
  trap - INT TERM
  [[ ! $failed ]] || fail 'some runs failed; the same command again continues'
}

# PREFIX RUN: sets `name`, that of the machines or jobs of a run: of lower case letters, digits and -.
name_of() {
  name=$1-$2
  name=${name,,} name=${name//[^a-z0-9-]/-}
}

# PREFIX: fails if the machines or jobs of two runs would have the same name.
check_names_of_runs() {
  local name runs run
  local -A run_of=()
  name_of "$1" all
  run_of[$name]='the finetune'
  read -ra runs <<< "${stages[*]}"
  for run in "${runs[@]}"; do
    name_of "$1" "$run"
    [[ ! ${run_of[$name]:-} ]] || fail "$run and ${run_of[$name]} would both be called $name; rename it"
    run_of[$name]=$run
  done
}

# Fails unless the working directory outlives the machines that runs are trained on, and the config
# is sent to them with the package.
check_remote_flags() {
  local words=" ${command[*]}"
  [[ $words == *' --workdir'* ]] || fail 'needs --workdir, like gs://BUCKET/NAME, which all machines see'
  [[ $words =~ \ --?config[\ =]configs/ ]] || fail 'needs a --config in configs/, which it sends'
}

dry_run='' one_job='' command=(python -m btx_jax.main)
for argument; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
    --one-job) one_job=1 ;;
    --run | --run=* | --distributed) fail "$argument is set by this script; omit it" ;;
    *) command+=("$argument") ;;
  esac
done

stages=()
if [[ ! $one_job ]]; then
  listed=$("${command[@]:0:3}" jobs "${command[@]:3}")
  [[ ! $listed ]] || mapfile -t stages <<< "$listed"
  # A last stage with a single run is the finetune.
  [[ ! $listed || ${stages[-1]} == *' '* ]] || unset 'stages[-1]'
fi
