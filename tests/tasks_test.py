"""Tasks of lm-evaluation-harness: scores follow from the model's logits."""

import dataclasses
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

import btx_jax
from btx_jax.commands import task_table
from btx_jax.configs import eval_paper
from btx_jax.data import tokenizer
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.scoring import continuations, find_tasks, task_scores
from tests import finished, own_tasks
from tests.helpers import TINY_MIXTURE, random_params, use_mesh
from tests.jobs import Job

TOKENIZER = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizer'
MODEL = dataclasses.replace(TINY_MIXTURE, vocab_size=512, num_layers=1)
CONTEXT = 64


@pytest.fixture(scope='module')
def params():
  return random_params(MODEL)


@pytest.fixture(scope='module')
def found(params, tmp_path_factory):
  """The model's scores on tasks in files, and the folder of the tasks."""
  pytest.importorskip('lm_eval')
  folder = tmp_path_factory.mktemp('tasks')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HF_DATASETS_CACHE', str(folder / 'cache'))
    own = own_tasks.write(folder / 'own')
    yield btx_jax.evaluate(MODEL, params, str(TOKENIZER), own_tasks.NAMES, include_path=own,
                           context=CONTEXT, shots=1), own


def log_probs(params, ids) -> np.ndarray:
  """The log-probabilities of every next token, in float64."""
  logits = np.asarray(btx_jax.logits(MODEL, params, np.pad(ids, (0, 80 - len(ids)))), np.float64)
  logits -= logits.max(-1, keepdims=True)
  return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:len(ids)]


def expected(params, before, after, context: int) -> tuple[float, bool]:
  ids = [*before, *after][-context - 1:]
  of_after = log_probs(params, ids[:-1])[-len(after):]
  return (of_after[np.arange(len(after)), after].sum(),
          of_after.argmax(-1).tolist() == list(after))


def test_a_continuation_scores_what_the_logits_say_on_any_mesh(params):
  """Long contexts lose their beginning; alternatives for the last token share a row."""
  rng = np.random.default_rng(0)
  draw = lambda most: rng.integers(0, MODEL.vocab_size, rng.integers(1, most)).tolist()
  pairs = [(draw(60), draw(20)) for _ in range(9)]
  before, after = pairs[0]
  pairs += [(before, [*after[:-1], last]) for last in range(3)]
  pairs.append(([*before, *after[:1]], after[1:]))
  greedy = int(log_probs(params, before[-40:])[-1].argmax())
  pairs.append((before, [greedy]))
  with use_mesh((1, 2, 4, 1)) as mesh:
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    scores = continuations.score(MODEL, placed, pairs, 40, batch_size=8)
    with pytest.raises(UsageError, match='A continuation has 20 tokens, and the model reads'):
      continuations.score(MODEL, placed, [([1], [2] * 20)], 19)
  for pair, score in zip(pairs, scores, strict=True):
    total, is_greedy = expected(params, *pair, 40)
    assert score.total == pytest.approx(total, abs=2e-4) and score.greedy == is_greedy
  assert scores[-1].greedy


def test_choices_texts_and_answers_are_those_of_the_model(found, params):
  scores, _ = found
  encode = lambda text: tokenizer.load(str(TOKENIZER)).encode([text])[0]
  samples = scores['samples']
  right = 0
  for sample in samples['capitals']:
    totals = []
    for (before, after), [(total, _)] in zip(sample['arguments'], sample['resps'], strict=True):
      whole, context = encode(before + after), encode(before)
      totals.append(total)
      assert total == pytest.approx(
          expected(params, context, whole[len(context):], CONTEXT)[0], abs=2e-4)
    right += int(np.argmax(totals) == sample['doc']['answer'])
  of = {task['name']: task for task in scores['tasks']}
  assert of['capitals']['metrics'][0]['value'] == right / len(own_tasks.CITIES)
  assert (of['capitals']['shots'], of['capitals']['documents']) == (1, 8)
  for sample in samples['capital_names']:
    [(prompt, _)], [[text]] = sample['arguments'], sample['resps']
    write = btx_jax.Generator(MODEL, params, str(TOKENIZER))
    [[alone]] = write([encode(prompt)[12 - CONTEXT:]], max_new_tokens=12, stop=['.', ',', '\n'])
    assert text == alone.text
  ids, prefix = encode(own_tasks.PROSE[0]), tokenizer.load(str(TOKENIZER)).bos_id
  windows = (([prefix], ids[:CONTEXT]), (ids[len(ids) - CONTEXT - 1:CONTEXT], ids[CONTEXT:]))
  [[total]] = samples['prose'][0]['resps']
  assert total == pytest.approx(
      sum(expected(params, *window, CONTEXT)[0] for window in windows), abs=2e-3)


def test_a_program_that_has_scored_a_model_can_download(params, monkeypatch):
  pytest.importorskip('lm_eval')
  from huggingface_hub import constants

  def refused(*_):
    assert constants.HF_HUB_OFFLINE
    raise UsageError('no such task')

  monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(find_tasks, '_manager', refused)
  with pytest.raises(UsageError, match='no such task'):
    btx_jax.evaluate(MODEL, params, str(TOKENIZER), ['any'])
  assert 'HF_HUB_OFFLINE' not in os.environ and not constants.HF_HUB_OFFLINE


def test_what_cannot_be_scored_is_said_before_a_model_is_read(found, monkeypatch):
  _, own = found
  load = lambda *names, **more: find_tasks.load(find_tasks.parse(names), own, **more)
  path = pathlib.Path(own)
  (path / 'far.yaml').write_text('task: far\ndataset_path: someone/else\n')
  (path / 'odd.yaml').write_text('task: odd\ndataset_path: json\noutput_type: none\n')
  (path / 'code.yaml').write_text('task: code\nunsafe_code: true\n')
  (path / 'both.yaml').write_text('group: both\ntask: [capitals, letters]\n')
  monkeypatch.setattr(find_tasks, '_manager', lambda *_: manager)
  from lm_eval.tasks import TaskManager
  manager = TaskManager(include_path=own, include_defaults=False)
  for names, message in (
      (('capitols',), "There is no task 'capitols'; did you mean 'capitals'?"),
      (('qqqqqqqq',), 'lm-eval ls tasks lists those of the harness'),
      (('far',), "The data set of the task 'far' is not on this machine"),
      (('odd',), "The task 'odd' cannot be loaded: ValueError"),
      (('code',), "The task 'code' runs the code that the model writes"),
      (('capitals', 'both'), "The task 'capitals' belongs to 'both' and to another name"),
      (('capitals', 'capitals:3'), "have 'capitals' twice, or an empty name")):
    with pytest.raises(UsageError, match=message):
      load(*names)
  with pytest.raises(UsageError, match='is not a directory'):
    find_tasks.load(find_tasks.parse(['capitals']), '/not/here')
  assert load('both').members == {'both': ['capitals', 'letters', 'both']}
  monkeypatch.setitem(sys.modules, 'lm_eval.evaluator', None)
  with pytest.raises(UsageError, match=r"pip install 'btx_jax\[eval\]'"):
    load('capitals')


def test_what_a_task_wants_and_the_model_cannot_do_is_said(found, params):
  from lm_eval.api.instance import Instance

  from btx_jax.scoring import harness
  of = tokenizer.load(str(TOKENIZER))
  model = harness.Model(MODEL, params, of, CONTEXT)
  for settings, message in (
      ({'do_sample': False, 'num_beams': 4}, 'The task sets num_beams = 4 for generation'),
      ({'max_gen_toks': 64}, 'The task generates up to 64 tokens, and the model reads at most 64')):
    with pytest.raises(UsageError, match=message):
      model.generate_until([Instance('generate_until', {}, ('a', settings), 0)])
  assert harness._sampling({'do_sample': True, 'temperature': 0.5, 'top_p': 0.9}) == (
      btx_jax.Sampling(temperature=0.5, top_p=0.9))
  of.bos_id = of.eos_id = None
  of.framing = of.framing._replace(begin=None, end=None)
  with pytest.raises(UsageError, match='has neither a bos nor an eos token'):
    harness.Model(MODEL, params, of, CONTEXT).loglikelihood_rolling(
        [Instance('loglikelihood_rolling', {}, ('a',), 0)])


def test_scores_of_runs_are_kept_and_reported_side_by_side(tmp_path):
  study = finished.write(finished.two_mixtures(), str(tmp_path))
  metric = {'metric': 'acc', 'filter': 'none', 'value': 0.5, 'error': 0.25,
            'higher_is_better': True}
  task = {'name': 'capitals', 'part_of': None, 'shots': 2, 'version': 1.0, 'limit': None,
          'documents': 4, 'hash': 'a', 'metrics': [metric]}
  for run, value, hashed in (('seed', 0.5, 'a'), ('btx', 0.75, 'a'), ('expert/code', 1.0, 'b')):
    changed = {**task, 'hash': hashed, 'metrics': [{**metric, 'value': value}]}
    task_scores.write(study, study.runs[run], {'harness': '1', 'context': 8, 'tasks': [changed]})
  found = task_table.of_study(study)
  assert [row['values'] for row in found['rows']] == [{'seed': 0.5, 'btx': 0.75},
                                                      {'expert/code': 1.0}]
  assert next(task_table.cells(found)) == [
      'capitals', 'acc', '2', '4', '0.500 ±0.250', '-', '0.750 ±0.250']
  path = tmp_path / 'btx' / 'tasks_capitals_2.json'
  kept = json.loads(path.read_text())
  path.write_text(json.dumps(kept | {'measured_on': {'run': 'another'}}))
  assert not task_scores.read(study, study.runs['btx'])


def test_two_processes_share_the_rows_and_the_first_alone_speaks(found, params, tmp_path):
  scores, own = found
  folder = str(tmp_path / 'model')
  btx_jax.save(folder, MODEL, params, tokenizer=str(TOKENIZER), dtype='float32')
  (code, out, errors), (other, silent, _) = Job(
      2, 1, 'evaluate', f'--model={folder}', '--tasks=letters,capital_names', '--shots=1',
      f'--include_path={own}', f'--length={CONTEXT}', '--json').end()
  assert (code, other) == (0, 0), errors
  assert silent == ''
  of = {task['name']: task for task in scores['tasks']}
  for ours in json.loads(out)['tasks']:
    theirs = of.pop(ours['name'])
    assert ours['hash'] == theirs['hash']
    for a, b in zip(ours['metrics'], theirs['metrics'], strict=True):
      assert a['value'] == pytest.approx(b['value'], rel=1e-4)


def test_the_paper_s_tasks_are_known_to_the_harness_with_the_paper_s_shots():
  lm_eval = pytest.importorskip('lm_eval')
  from lm_eval.tasks import TaskManager
  root = pathlib.Path(lm_eval.__file__).parent / 'tasks'
  places = ('gsm8k', 'minerva_math', 'benchmarks', 'humaneval', 'mbpp', 'nq_open', 'triviaqa',
            'arc', 'siqa', 'piqa', 'winogrande', 'mmlu/default')
  manager = TaskManager(include_path=[root / place for place in places], include_defaults=False)
  wanted = find_tasks.parse(eval_paper.TASKS)
  assert len(wanted) == 12
  for name, shots in wanted:
    assert name in manager.task_index
    fixed = {manager.task_index[each].cfg.get('num_fewshot')
             for each in find_tasks._reached(manager, name) if each in manager.all_subtasks}
    assert shots is not None and fixed <= {None, shots}, (name, fixed)
