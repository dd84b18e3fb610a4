"""btx_jax as a library: what docs/library.md shows, every docstring's example, and wrong input."""

import dataclasses
import doctest
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import btx_jax
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.model import llama
from tests import own_tasks
from tests.helpers import (
  TINY,
  TINY_MIXTURE,
  assert_trees_equal,
  random_batch,
  random_params,
  use_mesh,
)

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
TOKENIZER = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'
MODEL = dataclasses.replace(TINY, vocab_size=272)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Two saved models, with a tokenizer."""
  root = tmp_path_factory.mktemp('models')
  for seed, name in enumerate(('law', 'chemistry')):
    btx_jax.save(str(root / name), MODEL, random_params(MODEL, seed), str(TOKENIZER), 'float32')
  return root


def test_the_notebook_of_the_docs_runs(folders, tmp_path, capsys):
  page = (DOCS / 'library.md').read_text(encoding='utf-8')
  code, = re.findall(r'<!-- library: run -->\n```python\n(.*?)```', page, re.DOTALL)
  assert len(code.splitlines()) < 40
  out = str(tmp_path / 'out')
  exec(code, {'law': str(folders / 'law'), 'chemistry': str(folders / 'chemistry'), 'out': out})
  assert '(4, 32, 272)' in capsys.readouterr().out
  config, params = btx_jax.load(out)
  assert config == dataclasses.replace(MODEL, num_experts=2, top_k=2)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, llama.shapes(config))
  assert (tmp_path / 'out' / 'tokenizer.json').exists()


@pytest.mark.parametrize('name', sorted({*btx_jax.__all__} - {'__version__'}))
def test_the_example_of_a_docstring_is_right(name, folders, tmp_path, monkeypatch):
  if name == 'evaluate':
    pytest.importorskip('lm_eval')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  thing = getattr(btx_jax, name)
  params = random_params(MODEL)
  batch = jax.tree.map(lambda x: jnp.asarray(x)[None], random_batch(MODEL, rows=2, length=8))
  names = {each: getattr(btx_jax, each) for each in btx_jax.__all__} | {
      'jax': jax, 'jnp': jnp, 'dataclasses': dataclasses, 'config': MODEL, 'params': params,
      'seed': params, 'code': params, 'math': random_params(MODEL, 1), 'batch': batch,
      'optimizer': optax.sgd(0.1), 'folder': str(folders / 'law'), 'out': str(tmp_path / 'out'),
      'own_tasks': own_tasks.write(tmp_path / 'own_tasks')}
  example = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), names, name, None, None)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def test_importing_takes_no_time_and_what_is_there_is_listed():
  code = ('import sys, time; began = time.process_time(); import btx_jax; '
          'print(time.process_time() - began, "jax" in sys.modules, "numpy" in sys.modules); '
          'print(btx_jax.__version__, all(hasattr(btx_jax, name) for name in btx_jax.__all__))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  (seconds, *heavy), (version, there) = (line.split() for line in done.stdout.splitlines())
  assert float(seconds) < 0.2 and heavy == ['False', 'False']
  assert re.fullmatch(r'\d+\.\d+\.\d+', version) and there == 'True'
  with pytest.raises(AttributeError, match="no attribute 'lod'; it has Config, "):
    btx_jax.lod  # noqa: B018


def test_what_is_saved_is_what_is_loaded(folders, tmp_path):
  """And transformers' config has no ids of tokens that there are not."""
  params = random_params(TINY_MIXTURE)
  btx_jax.save(str(tmp_path / 'out'), TINY_MIXTURE, params, dtype='float32')
  config, loaded = btx_jax.load(str(tmp_path / 'out'))
  assert_trees_equal(loaded, params)
  assert config.num_experts == TINY_MIXTURE.num_experts
  described = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert described['bos_token_id'] is None and described['max_position_embeddings'] == 4096
  assert_trees_equal(btx_jax.load(str(folders / 'law'))[1], random_params(MODEL))


def test_a_chat_model_that_is_saved_still_stops(tmp_path):
  chat = shutil.copytree(TOKENIZER, tmp_path / 'chat')
  (chat / 'generation_config.json').write_text('{"eos_token_id": [7, 1], "top_p": 0.9}')
  btx_jax.save(str(tmp_path / 'out'), MODEL, random_params(MODEL), str(chat), 'float32')
  found = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
  assert (found['eos_token_id'], found['top_p']) == ([7, 1], 0.9)


def test_a_model_is_loaded_into_given_shardings(folders):
  with use_mesh((1, 2, 2, 2)) as mesh:
    _, params = btx_jax.load(str(folders / 'law'), mesh)
    expected = sharding.shardings(llama.shapes(MODEL), mesh)
    jax.tree.map(lambda x, at: np.testing.assert_equal(x.sharding, at), params, expected)
    _, again = btx_jax.load(str(folders / 'law'), expected)
  assert_trees_equal(params, again)


def test_logits_are_those_of_every_position(folders):
  """On a mesh too, whose devices the rows need not fill."""
  config, params = btx_jax.load(str(folders / 'law'))
  tokens = np.random.default_rng(0).integers(0, 272, (2, 9))
  found = btx_jax.logits(config, params, tokens)
  with use_mesh((1, 2, 2, 2)) as mesh:
    _, sharded = btx_jax.load(str(folders / 'law'), mesh)
    np.testing.assert_allclose(btx_jax.logits(config, sharded, tokens), found, rtol=1e-4,
                               atol=1e-5)
  np.testing.assert_allclose(btx_jax.logits(config, params, tokens[0, :4]), found[0, :4],
                             rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('call, error, message', [
    (lambda: btx_jax.load('docs'), UsageError, 'docs is neither a Hugging Face folder'),
    (lambda: btx_jax.logits(TINY, random_params(MODEL), [1]), ValueError,
     r"logits: 'embed' is \[272, 16\] in the parameters, and \[48, 16\] in the model"),
    (lambda: btx_jax.logits(TINY, random_params(TINY), [48]), ValueError,
     'tokens lie between 48 and 48, and the model has the ids 0 to 47'),
    (lambda: btx_jax.logits(TINY, random_params(TINY), [0.5]), ValueError, 'must be integers'),
    (lambda: btx_jax.save('docs', TINY, random_params(TINY)), UsageError, 'docs already exists'),
    (lambda: btx_jax.save('none', TINY, random_params(TINY), dtype='int8'), UsageError,
     "dtype = 'int8'; valid: 'bfloat16', 'float32'"),
    (lambda: btx_jax.save('none', TINY, random_params(TINY_MIXTURE)), ValueError,
     "save: 'layers/ffn/down' is absent in the parameters"),
    (lambda: btx_jax.save('none', TINY, random_params(TINY), tokenizer='none'), UsageError, 'none'),
])
def test_wrong_input_is_refused(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_shardings_of_another_tree_are_refused(folders):
  with pytest.raises(UsageError, match='is not a tree of one sharding per parameter'):
    btx_jax.load(str(folders / 'law'), {'embed': None})
