"""Preference runs in a study: the reference on disk, and mixtures of what they train."""

import json
import os

import jax
import numpy as np
import pytest

from btx_jax import base
from btx_jax.data.pair_rows import PairRows
from btx_jax.fitting import reference
from btx_jax.pipeline import Pipeline
from btx_jax.training import loop, metrics
from btx_jax.training.step import forward
from tests import make_tokenizers
from tests.helpers import final_params


def get_config(folder):
  """A seed on chosen answers, a DPO run on its end, and a mixture of both that takes SimPO."""
  pairs = [{'prompt': f'{i} + {i}?', 'chosen': f'{2 * i}', 'rejected': f'{i} ' * (1 + i % 3)}
           for i in range(40)]
  with open(folder / 'pairs.jsonl', 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(pair) + '\n' for pair in pairs)
  with open(folder / 'chats.jsonl', 'w', encoding='utf-8') as file:
    file.writelines(json.dumps({'prompt': pair['prompt'], 'completion': pair['chosen']}) + '\n'
                    for pair in pairs)
  config = base.get_config()
  config.domains = {'chats': base.domain(str(folder / 'chats.jsonl'), format='chat'),
                    'prefs': base.domain(str(folder / 'pairs.jsonl'), format='pairs')}
  config.tokenizer.update(path=str(make_tokenizers.write(
      folder / 'tokenizer', make_tokenizers.byte_level())), eos='<|endoftext|>',
                          chat_template='chatml')
  config.data.update(seq_len=128, held_out=0.1)
  config.model.update(dim=16, ffn_dim=24, num_layers=1, num_heads=2, num_kv_heads=2)
  config.optimizer.update(peak_lr=3e-2, warmup=0.0)
  config.train.batch_size = 8
  config.mesh.update(fsdp=1, expert=2, tensor=2)
  config.evaluation.update(tokens=500, batch_size=8)
  config.log_every = 1
  config.runs = {
      'sft': base.run(base.random(), {'chats': 1}, steps=2),
      'dpo': base.run(base.checkpoint('sft'), {'prefs': 1}, steps=8,
                      train={'loss': 'dpo', 'dpo_beta': 0.5}),
      'btx': base.run(base.mix('sft', 'dpo'), {'prefs': 1}, steps=4, train={'loss': 'simpo'}),
  }
  return config


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """All runs, trained after a kill between the reference and the first step of 'dpo'."""
  folder = tmp_path_factory.mktemp('preferences')
  pipeline = Pipeline(get_config(folder), str(folder / 'work'))
  pipeline.train('sft')
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
  rows = PairRows(study.prepare_text().train['prefs'], run.seq_len, 0)
  stored = reference.of(study, run)['prefs']
  parameters = jax.device_get(final_params(study, 'sft'))
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  nll = jax.jit(lambda params, batch: forward(run.model, params, batch).token_nll)(parameters, batch)
  sums = np.zeros((len(rows), run.seq_len))
  for row, segments in enumerate(batch['segment_ids']):
    for segment in range(1, segments.max() + 1):
      sums[row, segment] = -np.float64(nll)[row, segments == segment].sum()
  np.testing.assert_allclose(stored, rows.by_pair(sums), rtol=1e-4)
  assert np.isfinite(stored).all() and stored.shape == (rows._tokens.num_documents, 2)


def test_dpo_starts_at_log_2_and_the_model_learns_what_is_preferred(study):
  lines = metrics.read(study.folder('dpo'))
  assert lines[0]['loss'] == pytest.approx(np.log(2), abs=1e-4)
  assert lines[0]['preferences']['margin'] == pytest.approx(0, abs=1e-3)
  last = lines[-1]
  assert last['loss'] < 0.5 and last['preferences']['preferred'] > 0.9
  assert last['loss_by_domain'] == {'prefs': last['loss']}
  assert last['preferences']['margin'] > 0


def test_a_mixture_takes_a_loss_without_a_reference_and_its_balancing_loss(study):
  lines = metrics.read(study.folder('btx'))
  assert lines[-1]['loss'] < lines[0]['loss'] and lines[0]['balance'] > 0
  assert not os.path.exists(os.path.join(study.folder('btx'), 'reference'))
