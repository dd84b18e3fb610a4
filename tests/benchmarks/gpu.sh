#!/usr/bin/env bash
# accelerator.sh for GPUs: tests/benchmarks/gpu.sh [OUT.json]
exec "$(dirname "$0")/accelerator.sh" gpu "$@"
