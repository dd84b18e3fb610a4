# shellcheck shell=bash
# The environment of every job that these scripts start; sourced. Values that are set already take
# precedence: of XLA's flags the last one counts.
#
# An unknown flag ends the process: tests/launch_test.py lets jaxlib read them.

# jaxlib reads these everywhere, but they affect only GPUs. The layers are a loop (lax.scan): each
# iteration gathers sharded parameters (mesh.fsdp), and scatters or sums gradients.
gpu=(
  # Starts communication as early as the data allow, and waits for it as late. Off by default.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Extends this across iterations: the parameters of layer n+1 are fetched while layer n computes.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  # Unrolls two iterations, so that what is fetched for the next one is not copied.
  --xla_gpu_enable_while_loop_double_buffering=true
  # Combines the tensors of a layer into NCCL calls of up to this many bytes, to save latency.
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
)
export XLA_FLAGS="${gpu[*]} ${XLA_FLAGS:-}"

# TPUs get no flags. libtpu enables latency hiding and the fusion of collectives by default where it
# considers them safe. The flags that are often added for all-gathers
# (--xla_enable_async_all_gather, --xla_tpu_enable_async_collective_fusion_fuse_all_gather) change
# nothing on v5e, and libtpu 0.0.52 refuses them elsewhere because results may be wrong.
