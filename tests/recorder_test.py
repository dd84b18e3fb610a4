"""What a run records: routing figures against their definitions, warnings, TensorBoard."""

import numpy as np
import pytest

from btx_jax.study import plan
from btx_jax.terminal import Progress
from btx_jax.training import metrics, recorder, routing_figures, sinks
from tests import studies

DOMAINS = ['code', 'empty', 'prose']
L, G, E = 2, 3, 4


def random_sums(seed=0):
  """Sums of tokens that each pick two experts; the middle domain has no tokens."""
  rng = np.random.default_rng(seed)
  tokens = {'code': 50, 'empty': 0, 'prose': 30}
  sums = {'gates': np.zeros((L, G, E)), 'picks': np.zeros((L, G, E)),
          'entropy': np.zeros((L, G)), 'count': np.zeros((L, G))}
  routed = []
  for g, (domain, count) in enumerate(tokens.items()):
    for _ in range(count):
      for layer in range(L):
        ids = rng.choice(E, 2, replace=False)
        gate = rng.uniform(0.5, 1)
        sums['gates'][layer, g, ids] += [gate, 1 - gate]
        sums['picks'][layer, g, ids] += 1
        sums['count'][layer, g] += 1
        sums['entropy'][layer, g] += 0.7
        routed.append((layer, domain, dict(zip(ids, (gate, 1 - gate)))))
  return sums, routed


def test_figures_are_their_definitions():
  sums, routed = random_sums()
  found = routing_figures.describe(sums, DOMAINS)
  assert list(found['gates']) == ['code', 'prose']  # no figures without tokens
  for layer in range(L):
    for domain in ('code', 'prose'):
      gates = [g for at, d, g in routed if at == layer and d == domain]
      mean = [np.mean([g.get(e, 0) for g in gates]) for e in range(E)]
      share = [np.mean([e in g for g in gates]) for e in range(E)]
      np.testing.assert_allclose(found['gates'][domain][layer], mean, atol=1e-4)
      np.testing.assert_allclose(found['picks'][domain][layer], share, atol=1e-4)
      assert sum(found['picks'][domain][layer]) == pytest.approx(2, abs=1e-3)
    picks = [e for at, _, g in routed if at == layer for e in g]
    load = np.bincount(picks, minlength=E) / len(picks)
    np.testing.assert_allclose(found['load'][layer], load, atol=1e-4)
  assert found['largest_load'] == max(map(max, found['load']))
  assert found['smallest_load'] == min(map(min, found['load']))
  np.testing.assert_allclose(found['entropy'], 0.7)
  assert 'dropped' not in found  # this router drops nothing
  sums['dropped'] = np.array([[10, 0, 6], [0, 0, 24]])
  dropped = routing_figures.describe(sums, DOMAINS)['dropped']
  assert dropped == [0.1, 0.15]  # of 80 tokens' 160 choices


def test_mutual_information_of_independence_is_0_and_of_a_bijection_all():
  independent = np.outer([0.2, 0.3, 0.5], [0.1, 0.2, 0.3, 0.4])[None]
  np.testing.assert_allclose(routing_figures.mutual_information(independent), 0, atol=1e-12)
  each_its_own = np.eye(4)[None] * 7
  np.testing.assert_allclose(routing_figures.mutual_information(each_its_own), 2)  # bits
  rng = np.random.default_rng(0)
  joint = rng.random((1, 3, 4))
  p = joint[0] / joint.sum()
  entropy = lambda p: -(p * np.log2(p)).sum()
  np.testing.assert_allclose(
      routing_figures.mutual_information(joint),
      entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p), rtol=1e-9)


def test_starved_and_greedy_experts_are_found():
  sums, _ = random_sums()
  assert routing_figures.troubles(sums) == set()
  sums['picks'][1, 0, 3] = 0
  assert routing_figures.troubles(sums) == set()  # prose still goes there
  sums['picks'][1, 2, 3] = 0.0
  assert routing_figures.troubles(sums) == {('starved', 1, 3)}
  sums['gates'][0] = 0.02 * sums['count'][0][:, None]
  sums['gates'][0, :, 2] = 0.96 * sums['count'][0]
  found = routing_figures.troubles(sums)
  assert found == {('starved', 1, 3), ('takes_all', 0, 2)}
  assert routing_figures.warnings_about(found | {('starved', 0, 3)}, ['seed', 'a', 'b', 'c']) == [
      'expert 3 (c) gets under 1% of the tokens of every domain in layers 0, 1',
      'expert 2 (b) takes over 95% of all tokens in layer 0']


def test_tensorboard_gets_every_figure_but_no_text(tmp_path):
  values = {'loss': 2.5, 'loss_by_domain': {'code': 3.0}, 'warnings': ['expert 1'],
            'troubles': [['starved', 1, 2]], 'routing': {
                'entropy': [1.0, 2.0], 'gates': {'code': [[0.2, 0.8], [0.4, 0.6]]}}}
  board = sinks.TensorBoard(str(tmp_path), resume_step=0)
  board.write(3, 1e9, dict(sinks.figures({'step': 3, 'time': 1e9, **values})))
  board.close(finished=True)
  events = list((tmp_path / 'tensorboard').iterdir())
  assert len(events) == 1
  from tensorboardX.proto import event_pb2
  found = {}
  raw = events[0].read_bytes()
  while raw:  # length, its checksum, event, its checksum
    size = int.from_bytes(raw[:8], 'little')
    event = event_pb2.Event.FromString(raw[12:12 + size])
    found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
    raw = raw[16 + size:]
  assert found.keys() == {'loss', 'loss_by_domain/code', 'routing/entropy',
                          'routing/gates/code/0', 'routing/gates/code/1'}
  assert found['loss'] == (3, 2.5)
  assert found['routing/gates/code/1'][1] == pytest.approx(0.7)


def test_resuming_keeps_what_was_written_up_to_the_step(tmp_path):
  with metrics.MetricsFile(str(tmp_path)) as file:
    for step in (1, 2, 3):
      file.write(step, loss=float(step))
      if step == 2:
        mark = file.mark()
  with metrics.MetricsFile(str(tmp_path), 2, mark) as file:
    assert [line['step'] for line in file.kept] == [1, 2]
    file.write(3, loss=9.0)
  assert [line['loss'] for line in metrics.read(str(tmp_path))] == [1.0, 2.0, 9.0]
  with metrics.MetricsFile(str(tmp_path)):
    pass  # a run that starts again from nothing
  assert metrics.read(str(tmp_path)) == []


def test_the_clock_goes_on_while_a_line_is_written(text, tmp_path, monkeypatch):
  run = plan.make_plan(studies.get_config(text), 330)['seed']
  now = 100.0
  monkeypatch.setattr(recorder.time, 'monotonic', lambda: now)
  def wait_for_the_devices():
    nonlocal now
    now += 5
    return {}
  monkeypatch.setattr(recorder.hardware, 'peak_memory', wait_for_the_devices)
  figures = {'tokens_by_domain': np.ones(1, np.int64), 'nll_by_domain': np.ones(1), 'loss': 1.0,
             'grad_norm': 1.0, 'grad_norms': {}, 'param_norms': {}}
  with recorder.Recorder(run, str(tmp_path), ['code'], 2, 0, {}, (),
                         Progress({run.name: (0, run.steps)})) as made:
    for step in range(1, 7):
      now += 1
      made.record_step(step, figures)
  rates = [line['tokens_per_second'] for line in metrics.read(str(tmp_path))]
  # Of two steps: one second each, and the five of the line before
  assert rates == pytest.approx([run.batch_size * run.seq_len * share for share in (
      1, 2 / 7, 2 / 7)])
