"""The process that makes the reference's calls for `python -m tests.benchmarks`.

  python -m tests.benchmarks.reference_side SIZES

Runs in an environment with torch and transformers, and without ours. Its step is what
make_train_step does too: the mean cross-entropy, with a mixture's balancing loss; gradients clipped
by their norm; AdamW, fused. In bfloat16 it is autocast over float32 weights.
"""

import functools
import os
import sys

import torch
import transformers

from tests.benchmarks import sides
from tests.benchmarks.sizes import EXPERTS, Sizes


def make_step(sizes: Sizes, kind: str, dtype: str, experts: str = ''):
  common = {
      'vocab_size': sizes.vocab_size, 'hidden_size': sizes.dim, 'intermediate_size': sizes.ffn_dim,
      'num_hidden_layers': sizes.num_layers, 'num_attention_heads': sizes.num_heads,
      'num_key_value_heads': sizes.num_heads, 'max_position_embeddings': sizes.length,
      'use_cache': False, 'attn_implementation': 'sdpa'}
  if kind == 'mixture':
    config = transformers.MixtralConfig(
        **common, num_local_experts=sizes.num_experts, num_experts_per_tok=sizes.top_k,
        sliding_window=None, output_router_logits=True, router_aux_loss_coef=0.01,
        experts_implementation=experts)
    model = transformers.MixtralForCausalLM(config)
  else:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
  model.train()
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  ids = torch.randint(0, sizes.vocab_size, (sizes.rows, sizes.length))

  def step():
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
      loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step


def make_matmul(sizes: Sizes, dtype: str):
  m, k, n = sizes.matmul
  a, b = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((m, k), (k, n)))
  return lambda: a @ b


def make_products(sizes: Sizes, dtype: str):
  """The matmuls of a dense step alone."""
  tensors = [(count, *(torch.ones(shape, dtype=getattr(torch, dtype)) for shape in (
      (sizes.tokens, d), (sizes.tokens, f), (d, f)))) for d, f, count in sizes.products]

  def call():
    for count, x, y, w in tensors:
      for _ in range(count):
        x @ w, y @ w.T, x.T @ y

  return call


def main():
  sizes = Sizes.read(sys.argv[1])
  torch.manual_seed(0)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  makers = {}
  for dtype in sizes.dtypes:
    makers[f'dense {dtype}'] = functools.partial(make_step, sizes, 'dense', dtype)
    makers[f'matmul {dtype}'] = functools.partial(make_matmul, sizes, dtype)
    makers[f'products {dtype}'] = functools.partial(make_products, sizes, dtype)
    for experts in EXPERTS:
      makers[f'mixture {dtype} {experts}'] = functools.partial(
          make_step, sizes, 'mixture', dtype, experts)
  sides.serve({'torch': torch.__version__, 'transformers': transformers.__version__}, makers)


if __name__ == '__main__':
  main()
