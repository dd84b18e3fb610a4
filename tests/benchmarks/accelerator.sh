#!/usr/bin/env bash
# On a machine with GPUs or TPUs, in ten minutes: the tests of their kernels, then the time of train
# steps beside preflight's bound (tests/benchmarks/accelerator.py).
#
#   tests/benchmarks/accelerator.sh gpu|tpu [OUT.json]
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-} in
  gpu) export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" ;;
  tpu) export JAX_PLATFORMS=tpu ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
. launch/env.sh
tests=0
timeout 150 python -m pytest -q -m "$1" tests/accelerator_test.py || tests=$?
python -m tests.benchmarks.accelerator --seconds=420 --out="${2:-accelerator.json}"
exit "$tests"
