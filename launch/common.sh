# shellcheck shell=bash
# What the launchers have in common; sourced in the root of the repository, with their arguments:
#
#   --dry-run   prints what would be run, one command a line, and does nothing
#   --help      prints what stands at the head of the script
#   --one-job   all runs one after another as one job, those of config.stacked side by side
#   all else    belongs to the command: --config=..., --workdir=..., --config.train.batch_size=...
#
# Gives them
#
#   command     python -m btx_jax.main with its flags; the same again goes on where it stopped
#   stages      names of runs: those of an entry can be jobs at the same time, after those of the
#               entries before. What is not among them (at most one run, the finetune) is left to
#               the command without --run, which also compares.

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Words as a shell reads them back, in quotes where they need it.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# Does a command, or only prints it.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# FUNCTION NAME...: does a function for each name, all at once; fails if one of them does.
each() {
  local name id failed='' ids=()
  for name in "${@:2}"; do
    if [[ $dry_run ]]; then
      "$1" "$name"
      continue
    fi
    set -m  # a process group of its own, to be ended as a whole
    (trap : TERM && "$1" "$name") &  # this shell outlives what it does
    set +m
    ids+=($!)
  done
  # Ctrl-C, too, reaches them as SIGTERM, on which the command saves.
  trap 'kill -- "${ids[@]/#/-}" 2>/dev/null; wait; exit 130' INT TERM
  for id in "${ids[@]}"; do wait "$id" || failed=1; done
  trap - INT TERM
  [[ ! $failed ]] || fail 'not all were done; the same command again goes on'
}

# Fails unless runs have a place that outlives the machines they run on, and their config is one of
# those that go there.
to_be_sent() {
  local words=" ${command[*]}"
  [[ $words == *' --workdir'* ]] || fail 'needs --workdir, a directory that all machines share'
  [[ $words =~ \ --?config[\ =]configs/ ]] || fail 'takes a --config in configs/, which goes along'
}

dry_run='' one_job='' command=(python -m btx_jax.main)
for argument; do
  case $argument in
    --dry-run) dry_run=1 ;;
    --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;;
    --one-job) one_job=1 ;;
    --run | --run=* | --distributed) fail "$argument is for this script to say" ;;
    *) command+=("$argument") ;;
  esac
done

stages=()
if [[ ! $one_job ]]; then
  listed=$("${command[@]:0:3}" jobs "${command[@]:3}")
  [[ ! $listed ]] || mapfile -t stages <<< "$listed"
  # The last one alone is the finetune.
  [[ ! $listed || ${stages[-1]} == *' '* ]] || unset 'stages[-1]'
fi
