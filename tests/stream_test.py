"""Mixing as a stream: from folders to a folder, with one piece in memory at a time."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import tracemalloc

import jax
import numpy as np
import pytest

from btx_jax import base, btx, errors, recipe
from btx_jax.commands import table
from btx_jax.commands.export import export_run, identity
from btx_jax.convert import export, hugging_face, safetensors
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.model.config import shared_paths
from btx_jax.pipeline import Pipeline
from btx_jax.run import seed_of
from btx_jax.study import context, sources
from btx_jax.study.study import Study
from btx_jax.training import checkpoint, slices
from btx_jax.training.step import TrainState
from tests import studies
from tests.helpers import Arrays, assert_trees_equal, final_params, initial_params, random_params
from tests.pretrained_test import MODEL, TOKENIZER

NAMES = ('seed', 'code', 'math')


def write(folder, model, source, dtype='bfloat16', **options):
  given = {'max_length': 99, 'balance_loss': 0.0, 'bos_id': 0, 'eos_id': 1, 'card': '',
           'tokenizer_files': {file.name: file.read_bytes() for file in TOKENIZER.iterdir()}}
  return export.export(str(folder), model, source, dtype, **given | options)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Folders of three models, and their parameters as stored there."""
  root, params = tmp_path_factory.mktemp('models'), {}
  for i, name in enumerate(NAMES):
    params[name] = jax.tree.map(lambda x: np.asarray(x.astype('bfloat16')), random_params(MODEL, i))
    write(root / name, MODEL, Arrays(params[name]))
  return root, params


def study(root, workdir, kind=Study, **mix):
  """A study that needs no text: a mixture of pretrained models."""
  config = base.get_config()
  config.tokenizer.path = str(root / 'seed')
  config.runs = {name: base.run(base.hugging_face(str(root / name))) for name in NAMES}
  config.runs['btx'] = base.run(base.mix(*NAMES, allow=('seed',), **mix))
  return kind(config, str(workdir))


def content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'README.md'}


# What is computed


@pytest.mark.parametrize('mix', [
    {}, {'arrangement': 'split', 'chunks': 2},
    {'averaged': ('code', 'math'), 'rules': {'attn/[qk]$': 'seed'}}])
def test_a_stream_matches_mixing_in_memory(models, tmp_path, mix):
  root, params = models
  found = study(root, tmp_path / 'work', **mix)
  export_run(found, 'btx', str(tmp_path / 'out'), 'bfloat16')
  run, out = found.runs['btx'], hugging_face.Folder(str(tmp_path / 'out'))
  made = recipe.from_config(base.mix(*NAMES, **mix), NAMES, MODEL.ffn_dim, shared_paths(MODEL),
                            [0] * 3, found.config.mix.router_std)
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32),
                         *(params[name] for name in NAMES))
  expected = jax.jit(btx.mix, static_argnums=(1, 3))(
      stacked, run.model, jax.random.key(seed_of('btx', 0)), made)
  for key_path, leaf in jax.tree.leaves_with_path(expected):
    path = sharding.path_of(key_path)
    # Experts are copied. A mean may be rounded to the next bfloat16: two programs add it up.
    np.testing.assert_allclose(
        np.float32(out.read(path)), np.float32(leaf.astype('bfloat16')),
        rtol=0 if '/experts/' in path else 2**-7, err_msg=path)
  assert not (tmp_path / 'work').exists()


def test_experts_are_copied_between_files_and_means_are_not_transposed(
    models, tmp_path, monkeypatch):
  """For averaged parameters, the transposes of reading and writing cancel."""
  contiguous = []
  write_slice = safetensors.Writer.write

  def recorded(writer, name, values, *where):
    assert 'experts' not in name
    contiguous.append(values.flags.c_contiguous)
    write_slice(writer, name, values, *where)

  monkeypatch.setattr(safetensors.Writer, 'write', recorded)
  found = study(models[0], tmp_path)
  write(tmp_path / 'out', found.runs['btx'].model, sources.final(found, found.runs['btx']))
  moved = len(contiguous) - sum(contiguous)
  assert moved <= MODEL.num_layers  # the routers


def test_an_export_mixes_by_the_function_of_the_method(models, tmp_path, monkeypatch):
  def refuse(*_):
    raise ZeroDivisionError('mix')

  monkeypatch.setattr(btx, 'mix', refuse)
  with pytest.raises(ZeroDivisionError, match='mix'):
    export_run(study(models[0], tmp_path), 'btx', str(tmp_path / 'out'), 'bfloat16')


def _cannot(*_):
  raise OSError(errno.EXDEV, 'Invalid cross-device link')


def _some(source, into, count, start, at, call=os.copy_file_range):
  return call(source, into, min(count, 100), start, at)


@pytest.mark.parametrize('system', [_cannot, _some, lambda *_: 0, None])
def test_exports_without_copy_file_range(models, tmp_path, monkeypatch, system):
  found = study(models[0], tmp_path)
  model, source = found.runs['btx'].model, sources.final(found, found.runs['btx'])
  write(tmp_path / 'straight', model, source)
  if system:
    monkeypatch.setattr(os, 'copy_file_range', system)
  else:
    monkeypatch.delattr(os, 'copy_file_range')
  write(tmp_path / 'by_hand', model, source)
  assert content(tmp_path / 'by_hand') == content(tmp_path / 'straight')


def test_only_unchanged_slices_are_copied():
  made = recipe.from_config(base.mix(*NAMES, arrangement='split', chunks=2), NAMES, MODEL.ffn_dim,
                     shared_paths(MODEL), [0] * 3, 0.02)
  D, half = MODEL.dim, MODEL.ffn_dim // 2
  layer, width, hidden = slice(0, 1), slice(0, D), slice(0, half)
  fourth, second_half = slice(3, 4), slice(half, 2 * half)
  assert btx.verbatim(made, 'layers/ffn/experts/up', (layer, fourth, width, hidden)) == (
      1, 'layers/ffn/up', (layer, width, second_half))
  down = (layer, fourth, hidden, width)
  assert not btx.verbatim(made, 'layers/ffn/experts/down', down)  # doubled
  assert not btx.verbatim(made, 'layers/ffn/experts/up', (layer, slice(0, 2), width, hidden))
  assert not btx.verbatim(made, 'layers/attn/q', (layer,))


def test_a_source_that_shrinks_during_an_export(models, tmp_path):
  shutil.copytree(models[0] / 'code', tmp_path / 'code')
  file = tmp_path / 'code' / 'model.safetensors'
  source = hugging_face.Folder(str(tmp_path / 'code'))
  os.truncate(file, file.stat().st_size - 20)
  with pytest.raises(errors.RunError, match=r'code/model.safetensors has become shorter'):
    write(tmp_path / 'out', MODEL, source)
  assert not (tmp_path / 'out').exists()


def test_layers_of_another_dtype_are_not_rounded_twice(models, tmp_path):
  """A float32 model is mixed with bfloat16 ones as if all were float32."""
  root, params = models
  exact = random_params(MODEL, 7)
  write(tmp_path / 'exact', MODEL, Arrays(exact), 'float32')
  parts = [hugging_face.Folder(str(tmp_path / 'exact')), hugging_face.Folder(str(root / 'code'))]
  mix = btx.mix(parts, dataclasses.replace(MODEL, num_experts=2), jax.random.key(0))
  whole = tuple(slice(0, n) for n in (1, 2, MODEL.dim, MODEL.ffn_dim))
  found = mix.read('layers/ffn/experts/up', whole)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found[:, 0], exact['layers']['ffn']['up'])
  np.testing.assert_array_equal(
      found[:, 1], params['code']['layers']['ffn']['up'].astype(np.float32))


@pytest.mark.parametrize('name', ['model.layers.0.mlp.down_proj.weight',  # copied
                                  'model.layers.0.self_attn.o_proj.weight'])  # averaged
def test_numbers_that_are_not_finite_are_not_mixed(models, tmp_path, name):
  shutil.copytree(models[0], tmp_path / 'models')
  tensor = safetensors.File(str(tmp_path / 'models' / 'code' / 'model.safetensors')).tensors[name]
  with open(tmp_path / 'models' / 'code' / 'model.safetensors', 'r+b') as file:
    file.seek(tensor.start)
    file.write(b'\x80\x7f')  # infinity in bfloat16
  with pytest.raises(UsageError, match=rf'models/code.*: {name} has numbers that are not finite'):
    export_run(study(tmp_path / 'models', tmp_path / 'work'), 'btx', str(tmp_path / 'out'),
               'bfloat16')
  assert not (tmp_path / 'out').exists()


def test_numbers_that_are_not_finite_are_found_in_a_checkpoint(tmp_path):
  params = {'embed': jax.numpy.float32([[1, 2], [3, np.inf]])}
  with checkpoint.Checkpoints(str(tmp_path), '0' * 16) as checkpoints:
    state = TrainState(jax.numpy.int32(3), params, {'count': jax.numpy.int32(0)})
    checkpoints.save(3, state, {'step': 3})
  saved = slices.Saved(str(tmp_path), 3, '0' * 16)
  saved.read('embed', (slice(0, 1), slice(0, 2)))
  with pytest.raises(UsageError, match=r'/3: embed has numbers that are not finite'):
    saved.read('embed', (slice(1, 2), slice(0, 2)))


def test_a_mixture_keeps_the_context_and_the_stop_tokens_of_its_models(models, tmp_path):
  shutil.copytree(models[0], tmp_path / 'models')
  for name, settings in (('seed', {'eos_token_id': [1, 5], 'top_p': 0.9}),
                         ('math', {'eos_token_id': 7, 'top_p': 0.1})):
    (tmp_path / 'models' / name / 'generation_config.json').write_text(json.dumps(settings))
  found = study(tmp_path / 'models', tmp_path / 'work')
  run = dataclasses.replace(found.runs['btx'], seq_len=512)
  assert 'rows of data.seq_len = 512 tokens are longer than the 99 ' in context.remark(run)
  assert not context.remark(dataclasses.replace(run, seq_len=99))
  export_run(found, 'btx', str(tmp_path / 'out'), 'bfloat16')
  assert found.runs['btx'].seq_len > 99  # which is not claimed
  out = {name: json.loads((tmp_path / 'out' / f'{name}.json').read_text())
         for name in ('config', 'generation_config')}
  assert out['config']['max_position_embeddings'] == 99
  assert out['config']['eos_token_id'] == out['generation_config']['eos_token_id'] == [1, 5, 7]
  assert out['generation_config']['top_p'] == 0.9


# Interrupted exports


class Stops:
  """A source that fails at its `n`-th read, or never."""

  def __init__(self, source, n=10**9):
    self.scratch_bytes, self.extent = source.scratch_bytes, source.extent
    self._source, self._left, self.reads = source, n, 0

  def read(self, path, index):
    self.reads += 1
    if self.reads > self._left:
      raise KeyboardInterrupt
    return self._source.read(path, index)


def test_an_interrupted_export_continues(models, tmp_path):
  found, out = study(models[0], tmp_path), tmp_path / 'out'
  source, model = sources.final(found, found.runs['btx']), found.runs['btx'].model
  put = functools.partial(write, model=model, max_shard=3_000)
  whole, cut, rest = Stops(source), Stops(source, 12), Stops(source)
  total = put(tmp_path / 'straight', source=whole, identity='a')
  with pytest.raises(KeyboardInterrupt):
    put(out, source=cut, identity='a')
  assert not out.exists()
  partial = tmp_path / 'out.partial'
  shards = sorted(path.name for path in partial.glob('*.safetensors'))
  kept = (partial / shards[-1]).stat().st_mtime_ns
  assert 2 <= len(shards) < len(list((tmp_path / 'straight').glob('*.safetensors')))
  assert 0 < put(out, source=rest, identity='a') < total
  assert content(out) == content(tmp_path / 'straight')
  assert (out / shards[-1]).stat().st_mtime_ns == kept
  assert rest.reads < whole.reads
  assert not partial.exists()


@pytest.mark.parametrize('change', [
    {'identity': 'b'}, {'identity': ''}, {'dtype': 'float32'}, {'max_shard': 4_000}])
def test_a_different_export_starts_from_scratch(models, tmp_path, change):
  found = study(models[0], tmp_path)
  source, model = sources.final(found, found.runs['btx']), found.runs['btx'].model
  first = {'model': model, 'max_shard': 3_000, 'identity': change.get('identity') and 'a'}
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / 'out', source=Stops(source, 6), **first)
  again = Stops(source)
  write(tmp_path / 'out', source=again, **first | change)
  whole = Stops(source)
  write(tmp_path / 'straight', source=whole, **first | change)
  assert again.reads == whole.reads
  assert content(tmp_path / 'out') == content(tmp_path / 'straight')


def test_identities_depend_on_what_is_mixed_and_how(models, tmp_path):
  made = [study(models[0], tmp_path, **mix) for mix in (
      {}, {'averaged': ('code',)}, {'rules': {'embed': 'code'}})]
  found = [identity(each, each.runs['btx']) for each in made]
  assert len(set(found)) == 3
  again = study(models[0], tmp_path / 'elsewhere')
  assert identity(again, again.runs['btx']) == found[0]


@pytest.mark.parametrize('name,left', [('pwrite', 20_000), ('copy_file_range', 1_000)])
def test_a_full_disk(models, tmp_path, monkeypatch, name, left):
  found, out = study(models[0], tmp_path), tmp_path / 'out'
  source, model = sources.final(found, found.runs['btx']), found.runs['btx'].model
  put = functools.partial(write, out, model, source, max_shard=3_000, identity='a')
  call = getattr(os, name)

  def full(*given):
    nonlocal left
    left -= len(given[1]) if name == 'pwrite' else given[2]
    if left < 0:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return call(*given)

  monkeypatch.setattr(os, name, full)
  with pytest.raises(OSError) as caught:
    put()
  assert errors._explain(caught.value)[0].startswith(f'No space is left for {out}.partial/model-0')
  assert not out.exists()
  monkeypatch.undo()
  put()
  assert content(out).keys() >= {'config.json', 'model.safetensors.index.json'}
  hugging_face.Folder(str(out))


# Memory


def test_too_little_memory_is_refused_before_anything_is_written(models, tmp_path):
  found = study(models[0], tmp_path)
  found.config.mix.ram_gb = 0.001
  with pytest.raises(UsageError, match=r'mix.ram_gb = 0.001 is too small: embed needs at least'):
    export_run(found, 'btx', str(tmp_path / 'out'), 'bfloat16')
  assert not os.listdir(tmp_path)


def test_memory_is_what_the_budget_says(tmp_path):
  """By NumPy's allocations: the mean of four models, with one tensor far above the budget."""

  class Ones:

    def read(self, path, index):
      del path
      return np.ones([cut.stop - cut.start for cut in index], np.float32)

    def extent(self, path, index):
      del path, index

    def scratch_bytes(self, path):
      del path
      return 0

  model = dataclasses.replace(MODEL, vocab_size=30_000, dim=64)  # 8 MB of embedding
  mean = btx.average([Ones()] * 4, (1.0, 2.0, 3.0, 4.0))
  ram = 10**6
  tracemalloc.start()
  try:
    write(tmp_path / 'out', model, mean, 'float32', ram=ram)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < ram + 3e5  # Python's own memory
  out = hugging_face.Folder(str(tmp_path / 'out'))
  assert (out.read('embed', (slice(-3, None),)) == 1).all()


# As a run


def test_a_run_of_zero_steps_is_its_start(models, text, tmp_path):
  config = studies.get_config(text)
  root = models[0]
  config.tokenizer.path = str(root / 'seed')
  config.mesh.update(fsdp=1, expert=1, tensor=1)
  config.evaluation.every = 0
  config.domains = {'code': config.domains.code}
  config.runs = {
      'code': base.run(base.hugging_face(str(root / 'code'))),
      'start': base.run(base.mix('code', 'code'))}
  Pipeline(config, str(tmp_path / 'work')).train()
  config.runs['again'] = base.run(base.checkpoint('start'))
  config.runs['btx'] = base.run(base.checkpoint('again'), {'code': 1}, steps=1,
                                train={'balance_bias': 0.1})
  pipeline = Pipeline(config, str(tmp_path / 'work'))
  rows = {row['name']: row['mean'] for row in table.rows(pipeline)}
  assert list(rows) == ['code', 'start']
  assert abs(rows['code'] - rows['start']) < 1e-4  # two copies of it
  assert not os.path.exists(tmp_path / 'work' / 'start' / 'checkpoints')
  with jax.set_mesh(pipeline.mesh):
    mixed = final_params(pipeline, 'again')
    begin = initial_params(pipeline, 'btx')
  assert not begin['layers']['ffn'].pop('router_bias').any()
  assert_trees_equal(begin, mixed)
  export_run(pipeline, 'again', str(tmp_path / 'again'), 'float32')
  out = hugging_face.Folder(str(tmp_path / 'again'))
  for path, leaf in jax.tree.leaves_with_path(mixed):
    np.testing.assert_array_equal(out.read(sharding.path_of(path)), leaf)
  assert '| start | a mixture of code |' in (tmp_path / 'again' / 'README.md').read_text()


def test_plans_of_runs_without_steps(models, tmp_path):
  found = study(models[0], tmp_path)
  assert (found.runs['btx'].steps, found.runs['btx'].tokens) == (0, 0)
  found.config.runs['dense'] = base.run(base.random())
  with pytest.raises(UsageError, match=r'runs.dense.domains = {}: at least one weight must be'):
    Study(found.config, str(tmp_path))
  del found.config.runs['dense']
  found.config.runs['btx'].domains = {'code': 1.0}
  found.config.domains = {'code': base.domain('x.txt')}
  with pytest.raises(UsageError, match=r'runs.btx.steps = 0 must be at least 1'):
    Study(found.config, str(tmp_path))
