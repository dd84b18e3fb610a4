# shellcheck shell=bash
# The environment of every job that these scripts start; sourced. What is set already, wins: flags
# of XLA that come last count.
#
# An unknown flag ends the process: tests/launch_test.py has jaxlib read them.

# Read by jaxlib everywhere, and of effect on GPUs. The layers are a loop (lax.scan), and on each
# turn parameters that are cut up (mesh.fsdp) are gathered, and gradients scattered or summed.
gpu=(
  # Starts communication as early, and waits for it as late, as the data allow: off by default.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Lets it cross the turns of the loop: what layer n+1 needs is fetched while layer n computes.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  # Two turns as one, so that what is fetched for the next turn needs no copy.
  --xla_gpu_enable_while_loop_double_buffering=true
  # Tensors of a layer in one NCCL call of up to so many bytes: many small calls cost latency.
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
)
export XLA_FLAGS="${gpu[*]} ${XLA_FLAGS:-}"

# TPUs get no flags. The scheduler that hides latency, and the fusion of collectives into what hides
# them, are on by default where libtpu trusts them. What is often added, to have all-gathers take
# part (--xla_enable_async_all_gather, --xla_tpu_enable_async_collective_fusion_fuse_all_gather),
# changes nothing on v5e, and elsewhere libtpu 0.0.52 refuses it: results may be wrong.

# A job that goes on does not compile again, nor does the second of the experts that differ in text
# only: they are one program. Best on storage that the hosts share. Not on CPUs: what is compiled on
# one, another may not be able to run.
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/btx_jax}"
fi
