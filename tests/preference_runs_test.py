"""A preference run in a study: its reference on disk, its figures and its scores."""

import json
import os

import jax
import numpy as np
import pytest

from btx_jax import base
from btx_jax.data.pair_rows import PairRows
from btx_jax.data.text import Text
from btx_jax.fitting import reference
from btx_jax.pipeline import Pipeline
from btx_jax.scoring import ranking, scores
from btx_jax.study.study import Study
from btx_jax.training import loop, metrics
from btx_jax.training.step import forward
from tests import make_tokenizers
from tests.helpers import initial_params


def get_config(folder):
  """DPO on a random model, and a run that continues it."""
  pairs = [{'prompt': f'{i} + {i}?', 'chosen': f'{2 * i}' * (1 + i % 4),
            'rejected': f'{i} ' * (1 + i % 3)} for i in range(40)]
  with open(folder / 'pairs.jsonl', 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(pair) + '\n' for pair in pairs)
  config = base.get_config()
  config.domains = {'prefs': base.domain(str(folder / 'pairs.jsonl'), format='pairs')}
  config.tokenizer.update(path=str(make_tokenizers.write(
      folder / 'tokenizer', make_tokenizers.byte_level())), eos='<|endoftext|>',
                          chat_template='chatml')
  config.data.update(seq_len=128, held_out=0.1)
  config.model.update(dim=16, ffn_dim=24, num_layers=1, num_heads=2, num_kv_heads=2)
  config.optimizer.update(peak_lr=3e-2, warmup=0.0)
  config.train.batch_size = 8
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.evaluation.update(tokens=500, batch_size=8)
  config.log_every = 1
  config.runs = {
      'dpo': base.run(base.random(), {'prefs': 1}, steps=12,
                      train={'loss': 'dpo', 'dpo_beta': 0.5}),
      'more': base.run(base.checkpoint('dpo', state=True), {'prefs': 1}, steps=1,
                       train={'loss': 'dpo', 'dpo_beta': 0.5}),
  }
  return config


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """All runs; they were killed between the reference and the first step of 'dpo', then resumed."""
  folder = tmp_path_factory.mktemp('preferences')
  pipeline = Pipeline(get_config(folder), str(folder / 'work'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'run', _killed)
    with pytest.raises(KeyboardInterrupt):
      pipeline.train('dpo')
  path = folder / 'work' / 'dpo' / 'reference' / 'reference.json'
  before = path.read_bytes(), os.stat(path).st_mtime_ns
  pipeline = Pipeline(get_config(folder), str(folder / 'work'))
  pipeline.train()
  assert (path.read_bytes(), os.stat(path).st_mtime_ns) == before
  return pipeline


def _killed(*_):
  raise KeyboardInterrupt


def test_the_reference_is_what_a_second_model_in_memory_finds(study):
  run = study.runs['dpo']
  train = study.prepare_text().train['prefs']
  rows = PairRows(train, run.seq_len, 0)
  stored = reference.of(study, run)['prefs']
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  @jax.jit
  def losses(params, batch):
    return forward(run.model, params, batch).token_nll

  parameters = initial_params(study, 'dpo')
  nll = losses(jax.device_get(parameters), batch)
  sums, means = np.zeros((2, len(rows), run.seq_len))
  for row, segments in enumerate(batch['segment_ids']):
    for segment in range(1, segments.max() + 1):
      sums[row, segment] = -np.float64(nll)[row, segments == segment].sum()
      means[row, segment] = -nll[row, batch['loss_mask'][row] & (segments == segment)].mean()
  np.testing.assert_allclose(stored, rows.by_pair(sums), rtol=1e-4)
  assert np.isfinite(stored).all() and stored.shape == (train.num_documents, 2)

  # Likewise the share of pairs whose chosen answer is likelier per token.
  with jax.set_mesh(study.mesh):
    found = ranking.preferred(run.model, parameters, train, study.mesh, run.seq_len, 8)
  expected = np.subtract(*rows.by_pair(means).T) > 0
  assert found == expected.mean() and 0 < found < 1


def test_a_run_that_continues_another_with_its_state_keeps_its_reference(study):
  before, after = (reference.of(study, study.runs[name])['prefs'] for name in ('dpo', 'more'))
  np.testing.assert_allclose(after, before, rtol=1e-6)
  margin = metrics.read(study.folder('more'))[0]['preferences']['margin']
  assert margin > metrics.read(study.folder('dpo'))[-1]['preferences']['margin'] / 2


def test_dpo_starts_at_log_2_and_the_model_learns_what_is_preferred(study):
  lines = metrics.read(study.folder('dpo'))
  assert lines[0]['loss'] == pytest.approx(np.log(2), abs=1e-4)
  assert lines[0]['preferences']['margin'] == pytest.approx(0, abs=1e-3)
  last = lines[-1]
  assert last['loss'] < 0.5 and last['preferences']['preferred'] > 0.9
  assert last['loss_by_domain'] == {'prefs': last['loss']}
  assert last['preferences']['margin'] > 0


def test_held_out_pairs_are_scored_by_the_chosen_answers_and_ranked(study):
  found = scores.read(study, study.runs['dpo'], scores.FINAL)
  held_out = study.prepare_text().held_out['prefs']
  assert len(found['prefs']['units']['bytes']) == held_out.num_documents
  assert sum(found['prefs']['units']['bytes']) == held_out.bytes[-1]
  assert found['prefs']['bits_per_byte'] > 0 and 0 <= found['prefs']['preferred'] <= 1


def test_the_reference_of_a_mixture_that_is_extended_is_computed_with_the_sizes_it_had(
    tmp_path, monkeypatch):
  config, loss = get_config(tmp_path), {'loss': 'dpo'}
  config.runs = {
      'seed': base.run(base.random(), {'prefs': 1}, steps=1, train=loss),
      'mix': base.run(base.mix('seed', 'seed'), {'prefs': 1}, steps=1, train=loss),
      'wider': base.run(base.extend('mix', 'seed', allow=('shared',), state=True), {'prefs': 1},
                        steps=1, train=loss)}
  study, found = Study(config, str(tmp_path / 'work')), []
  monkeypatch.setattr(reference.params, 'initial', lambda study, run, mesh: run)
  monkeypatch.setattr(reference, 'answers', lambda model, of, *_: (
      found.append((model, of)) or np.zeros((1, 2))))
  reference.compute(study, study.runs['wider'], Text(None, {'prefs': None}, {}), None)
  assert study.runs['wider'].model.num_experts == 3
  assert found == [(study.runs['mix'].model, study.runs['mix'])]
