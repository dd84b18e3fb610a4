#!/usr/bin/env bash
# accelerator.sh for TPUs: tests/benchmarks/tpu.sh [OUT.json]
exec "$(dirname "$0")/accelerator.sh" tpu "$@"
