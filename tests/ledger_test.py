"""The ledger: its FLOPs against compiled train steps, and the other figures by hand."""

import dataclasses
import json
import os

import pytest

from btx_jax import base
from btx_jax.commands import ledger as command
from btx_jax.devices.hardware import UNKNOWN
from btx_jax.fitting.flops import fit_flops
from btx_jax.model.config import Config, train_flops_by_part
from btx_jax.preflight import cost, hlo
from btx_jax.run import lineage
from btx_jax.scoring import ledger, scores
from btx_jax.study import manifest, plan
from btx_jax.training.program import make_program
from tests import finished
from tests.helpers import use_mesh

V, D, F, L, N, K, T, B = 96, 64, 128, 2, 4, 2, 64, 8
H = D // N


# FLOPs


def run_of(init=None, batch_size=B, **fields):
  """A run of a small model, which is the mixture of four if `init` is not given."""
  config = base.get_config()
  config.domains = {'code': base.domain('/nowhere')}
  config.tokenizer.vocab_size = V
  config.data.seq_len = T
  config.model.update(dim=D, ffn_dim=F, num_layers=L, num_heads=N, num_kv_heads=K,
                      dispatch='grouped', dispatch_factor=2.0)  # one round of dispatch
  train = {'batch_size': batch_size, **fields.pop('train', {})}
  config.runs.seed = base.run(base.random(), {'code': 1}, steps=3)
  config.runs.measured = base.run(
      init or base.mix(*['seed'] * 4), {'code': 1}, steps=3, train=train, **fields)
  return plan.make_plan(config, V)['measured']


def compiled_flops(run) -> float:
  """FLOPs of the dots in the compiled train step, as often as its loops run."""
  with use_mesh((1, 1, 1, 1)) as mesh:
    text = make_program([run], mesh, num_domains=1).lower().compile().as_text()
    return cost.CostModel(hlo.parse(text), UNKNOWN, mesh, lambda *_: 1.0).total().flops


def counted_flops(run) -> float:
  """The ledger's FLOPs of a step on one CPU, with those that it leaves out."""
  beyond = ledger.overhead_of(run, '1 x cpu')
  assert None not in beyond.values()
  return (run.flops + sum(beyond.values())) / run.steps


@pytest.mark.parametrize('case, left_out', [
    ({'init': base.random(), 'batch_size': 10}, {'masked', 'padding'}),  # 640 tokens: two chunks
    ({'init': base.random(), 'model': {'remat': 'full'}}, {'masked', 'recomputed'}),
    ({'init': base.random(), 'model': {'remat': 'projections'}}, {'masked', 'recomputed'}),
    ({'init': base.random(), 'train': {'freeze': base.FREEZE_ALL_BUT_EXPERTS}}, {'masked'}),
    ({}, {'masked', 'padding'}),
    ({'model': {'remat': 'full'}, 'train': {'balance_scope': 'batch'}},
     {'masked', 'recomputed', 'second_pass', 'padding'}),
], ids=['dense', 'full', 'projections', 'frozen', 'mixture', 'mixture again'])
def test_flops_are_those_of_the_compiled_train_step(case, left_out):
  run = run_of(**case)
  assert {name for name, flops in ledger.overhead_of(run, '1 x cpu').items() if flops} == left_out
  assert compiled_flops(run) == pytest.approx(counted_flops(run), rel=0.02)


def test_workers_compute_as_much_as_one():
  workers = run_of(base.random(), train={'workers': 2, 'sync_every': 2})
  plain = dataclasses.replace(workers, outer=None)
  assert counted_flops(workers) == counted_flops(plain)
  assert compiled_flops(workers) == pytest.approx(counted_flops(plain), rel=0.02)


def test_the_parts_of_a_dense_step_by_hand():
  """Forward and backward are three products of two FLOPs per multiply-add."""
  found = train_flops_by_part(Config(V, dim=D, ffn_dim=F, num_layers=L, num_heads=N,
                                     num_kv_heads=K), T)
  # Position t sees t + 1 keys, about half of T; each costs H for the score and H for the sum.
  pairs = sum(t + 1 for t in range(T)) / T
  assert found.pop('scores') == pytest.approx(6 * L * N * 2 * H * pairs, rel=1 / T)
  assert found == {'feed-forward': 6 * L * 3 * D * F, 'projections': 6 * L * (2 * N + 2 * K) * H * D,
                   'routers': 0, 'head': 6 * V * D}


def test_what_kernels_compute_is_not_known():
  run = run_of(base.random(), model={'dtype': 'bfloat16', 'remat': 'full'})
  found = ledger.overhead_of(run, '8 x NVIDIA H100 80GB HBM3')
  assert (found['masked'], found['recomputed']) == (None, None)
  assert found['padding'] == 0 == found['second_pass']
  assert {*ledger.overhead_of(run, '').values()} == {None}
