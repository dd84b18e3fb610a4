"""Scores on tasks of lm-evaluation-harness equal those of its own `hf` model: pytest -m reference,
if torch, transformers and lm-eval are installed. $BTX_REFERENCE_MODEL names one more folder."""

import os
import pathlib

os.environ['HF_HUB_OFFLINE'] = '1'  # before transformers is imported

import numpy as np
import pytest

import btx_jax
from btx_jax.convert import export
from btx_jax.data import tokenizer
from btx_jax.model.config import Config
from tests import own_tasks
from tests.helpers import Arrays, random_params

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings('ignore')]

MIXTRAL = Config(vocab_size=512, dim=32, ffn_dim=72, num_layers=2, num_heads=4, num_kv_heads=2,
                 num_experts=4, top_k=2, norm_eps=1e-5)
CONTEXT = 64  # so that prompts are truncated, and texts cut into windows
TOKENIZERS = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'


@pytest.fixture(scope='module', params=['mixture', 'folder'])
def folder(request, tmp_path_factory):
  for name in ('torch', 'transformers', 'lm_eval'):
    pytest.importorskip(name)
  if request.param == 'folder':
    if not os.environ.get('BTX_REFERENCE_MODEL'):
      pytest.skip('BTX_REFERENCE_MODEL names no folder')
    return os.environ['BTX_REFERENCE_MODEL']
  path = tmp_path_factory.mktemp('out') / 'mixture'
  files = {file.name: file.read_bytes() for file in TOKENIZERS.iterdir() if file.is_file()}
  export.export(str(path), MIXTRAL, Arrays(random_params(MIXTRAL, scale=0.2)), 'float32',
                max_length=512, balance_loss=0.01, bos_id=1, eos_id=2, tokenizer_files=files,
                card='')
  return str(path)


def test_scores_are_those_of_the_harness_s_own_model(folder, tmp_path, monkeypatch):
  from lm_eval import evaluator
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  tasks = own_tasks.write(tmp_path / 'tasks')
  config, params = btx_jax.load(folder)
  encode = tokenizer.load(folder).encode
  ours = btx_jax.evaluate(config, params, folder, own_tasks.NAMES, include_path=tasks, shots=2,
                          context=CONTEXT)
  monkeypatch.chdir(tasks)  # the harness looks for data from there
  theirs = evaluator.simple_evaluate(
      HFLM(pretrained=folder, max_length=CONTEXT, dtype='float32', batch_size=4, device='cpu'),
      num_fewshot=2, tasks=list(own_tasks.NAMES),
      task_manager=TaskManager(include_path=tasks, include_defaults=False))
  for task in ours['tasks']:
    name = task['name']
    for metric in task['metrics']:
      assert metric['value'] == pytest.approx(
          theirs['results'][name][f'{metric["metric"]},{metric["filter"]}'], rel=1e-4), name
    for a, b in zip(ours['samples'][name], theirs['samples'][name], strict=True):
      assert (a['arguments'], a['prompt_hash']) == (b['arguments'], b['prompt_hash'])
      if name == 'capital_names':
        assert a['resps'] == b['resps']
      elif name == 'prose':
        tokens = len(encode([a['doc']['text']])[0])
        np.testing.assert_allclose(a['resps'], b['resps'], rtol=0, atol=1e-5 * tokens)
      else:
        for [mine], [other] in zip(a['resps'], b['resps'], strict=True):
          assert abs(mine[0] - other[0]) < 1e-3 and mine[1] == other[1]
