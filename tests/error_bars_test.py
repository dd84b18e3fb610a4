"""Error bars of bits per byte: the units of text, the jackknife, and claims judged by it."""

import json
import math
import random
import types

import numpy as np
import pytest

from btx_jax.commands import claims, measured, report, seeds, table
from btx_jax.data import corpora, splits, tokens
from btx_jax.data.tokens import Tokens
from btx_jax.scoring import error_bars, scores, units
from btx_jax.study import manifest
from btx_jax.study.study import Study
from tests import make_tokenizers as make
from tests import studies


def text_of(count, seed=0):
  """Units of very different sizes: bytes, and how hard each is in nats per byte."""
  rng = np.random.default_rng(seed)
  return rng.integers(50, 5000, count), rng.gamma(20, 0.07, count)


def scored(hardness, size, shift=0.0, noise=0.02, seed=1):
  """A model's score of each unit: what the text decides, its own shift, and noise."""
  rates = hardness + shift + noise * np.random.default_rng(seed).normal(size=len(size))
  return {'nll': (rates * size).tolist(), 'bytes': size.tolist()}


def bootstrap(top, bottom, draws=2000):
  """The standard deviation of a ratio of sums over samples of the units."""
  top, bottom, rng = np.asarray(top), np.asarray(bottom), np.random.default_rng(2)
  drawn = rng.integers(0, len(bottom), (draws, len(bottom)))
  return (top[drawn].sum(1) / bottom[drawn].sum(1)).std()


# The jackknife


@pytest.mark.parametrize('count', [50, 300])
@pytest.mark.parametrize('seed', range(3))
def test_errors_are_those_of_a_bootstrap(count, seed):
  size, hardness = text_of(count, seed)
  a, b = (scored(hardness, size, shift, seed=i) for i, shift in enumerate((0.0, 0.1)))
  nll_a, nll_b = (np.divide(each['nll'], math.log(2)) for each in (a, b))  # in bits
  assert error_bars.error_of(a) == pytest.approx(bootstrap(nll_a, size), rel=0.1)
  paired = error_bars.error_of_difference(a, b)
  assert paired == pytest.approx(bootstrap(nll_a - nll_b, size), rel=0.1)
  assert error_bars.error_of_percent(b, a) == pytest.approx(100 * bootstrap(nll_b, nll_a), rel=0.1)
  unpaired = math.hypot(error_bars.error_of(a), error_bars.error_of(b))
  assert paired < unpaired / 5


def test_of_equal_units_the_error_is_that_of_their_mean():
  nll = np.random.default_rng(0).gamma(9, size=40).tolist()
  expected = np.divide(nll, 100 * math.log(2)).std(ddof=1) / math.sqrt(40)
  assert error_bars.error_of({'nll': nll, 'bytes': [100] * 40}) == pytest.approx(
      expected, rel=1e-12)
  assert error_bars.error_of_mean([3.0, 4.0]) == 2.5
  assert error_bars.error_of_mean([3.0, None]) is None


def test_the_mean_and_spread_over_seeds_need_all_of_them():
  assert error_bars.mean([1.0, 3.0]) == 2 and error_bars.spread([1.0, 3.0]) == math.sqrt(2)
  assert error_bars.mean([1.0]) == 1 and error_bars.spread([1.0]) is None
  for unknown in ([], [None], [1.0, None, 3.0]):
    assert error_bars.mean(unknown) is None is error_bars.spread(unknown)


def test_an_error_that_cannot_be_known_is_none():
  assert error_bars.error_of_ratio([1.0], [10]) is None
  assert error_bars.error_of_ratio([1.0, 2.0], [10, 0]) is None
  a, b = {'nll': [1.0, 2.0], 'bytes': [10, 20]}, {'nll': [1.0, 2.0], 'bytes': [20, 10]}
  assert error_bars.error_of_difference(a, b) is None
  assert error_bars.error_of_percent(a, b) is None


# Units


ENCODE = {'special': 'encode', 'bos': '<s>'}  # so marks in the text are tokens, and may frame it
KINDS = [*((kind, {}) for kind in make.LOSSLESS),
         *((kind, ENCODE) for kind in make.LOSSLESS if 'sentencepiece' not in kind)]


@pytest.mark.parametrize('kind, options', KINDS)
def test_blocks_of_documents_have_the_bytes_of_their_text(tmp_path, monkeypatch, kind, options):
  monkeypatch.setattr(units, 'BLOCK', 16)
  found, rng = make.load(tmp_path, make.LOSSLESS[kind](), **options), random.Random(0)
  texts = ['<s>' * (i % 2) + ' ' * (i % 3)
           + '<s>  '.join(make.random_text(rng) for _ in range(1 + i % 8)) + '</s>' * (i % 5 // 4)
           for i in range(60)] + [' a', 'b', 'the', '<s>', ' d', '  e', 'f', 'g']
  path = tmp_path / 'text.jsonl'
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  tokens.prepare(str(tmp_path / 'x'), corpora.Domain('x', paths=(str(path),)), found, 0.5)
  part = tokens.load(str(tmp_path / 'x'), 'held_out')
  starts, sizes = units.cut(part, found)
  lengths, ends = np.diff(part.starts), np.append(starts[1:], len(part.ids))
  whole = np.isin(starts, part.starts) == np.isin(ends, part.starts)
  assert (~whole).sum() > 20 and (lengths <= 16).any()
  assert (ends - starts)[~whole].min() >= 8 and (ends - starts).max() < 24 + lengths.min()
  assert np.array_equal(starts[np.isin(starts, part.starts)],
                        part.starts[:-1][lengths > 1 + part.ends])  # others have no score
  held_out = [text for text in texts if splits.share(text) < 0.5]
  for text, first, end, size in zip(
      held_out, part.starts[:-1], part.starts[1:], np.diff(part.bytes), strict=True):
    inside = np.flatnonzero((starts >= first) & (starts < end))
    assert sizes[inside].sum() == (size if len(inside) else 0)
    left = text.encode()
    if options and len(inside) > 1:
      left = left.removesuffix(b'</s>')  # its own end mark
    for unit in inside[:0:-1]:  # from the end: each block has the bytes before those after it
      ids = part.ids[starts[unit]:min(ends[unit], end - part.ends)].tolist()
      left, own = left[:len(left) - sizes[unit]], left[len(left) - sizes[unit]:]
      assert own.lstrip(b' ') == found.spell(ids).lstrip(b' ')


def test_units_add_up_to_the_score():
  """And a document without a token that is scored is no unit."""
  starts, sizes = np.array([0, 2, 7, 60, 62, 90, 92]), np.array([0, 0, 9, 140, 140, 200, 200])
  part = Tokens(np.arange(92), starts, sizes, 'x', begins=0, ends=1)
  nll = np.random.default_rng(0).gamma(9, size=92)
  nll[starts[:-1]] = nll[starts[1:] - 1] = 0
  spells = types.SimpleNamespace(spell=lambda ids: b'four ' * len(ids))
  found = json.loads(json.dumps(units.score(nll, part, spells)))
  assert found['bits_per_byte'] == pytest.approx(nll.sum() / math.log(2) / 200, rel=1e-12)
  of_units = error_bars.bits_per_byte(sum(found['units']['nll']), sum(found['units']['bytes']))
  assert of_units == pytest.approx(found['bits_per_byte'], abs=1e-9)
  assert found['units']['bytes'] == [9, 131, 60]
  assert (found['documents'], found['tokens'], found['bytes']) == (6, 3 + 51 + 26, 200)
  nothing = Tokens(np.arange(2), np.array([0, 2]), np.array([0, 0]), 'x', begins=0)
  assert units.score(np.zeros(2), nothing, spells)['units'] == {'nll': [], 'bytes': []}


# Tables and claims


@pytest.fixture
def make_study(text, tmp_path, monkeypatch):
  """Makes studies whose runs are all complete, and scored without any being computed."""
  def make_study(count=30, shifts=(), old=(), seeds=()):
    """
    Args:
      count: units of text.
      shifts: (run, stage, domain) -> what its score differs by, in nats per byte.
      old: names of runs that an earlier version measured, without units.
      seeds: the config's.
    """
    config = studies.get_config(text)
    config.seeds = seeds
    size, hardness = text_of(count)

    def read(_, run, stage):
      if stage in (scores.MASKED, *scores.ALONE.values()):
        return None
      result = {}
      for number, domain in enumerate(studies.WORDS):
        shift = dict(shifts).get((run.name, stage, domain), 0.0)
        of_units = scored(hardness, size, shift, seed=100 * number + len(run.name + stage))
        result[domain] = {
            'bits_per_byte': error_bars.bits_per_byte(sum(of_units['nll']), size.sum()),
            'documents': 7, 'tokens': 5000, 'bytes': int(size.sum()), 'units': of_units,
            'gates': [[0.4, 0.3, 0.2, 0.1]] * 2,
            'sample': {'pieces': ['a'], 'gates': [[0.4, 0.3, 0.2, 0.1]]}}
        if run.name in old:
          del result[domain]['documents'], result[domain]['units']
      return result

    monkeypatch.setattr(scores, 'read', read)
    monkeypatch.setattr(Study, 'state', lambda *_: manifest.COMPLETE)
    return Study(config, str(tmp_path / 'work'))

  return make_study


def check_of(checks, beginning):
  found, = (each for each in checks if each['name'].startswith(beginning))
  return found


BETTER = {('btx', 'final', 'code'): -0.3, ('btx', 'final', 'prose'): -0.005,
          ('btx', 'final', 'math'): -0.45}


def test_claims_are_judged_by_differences_paired_by_unit(make_study):
  study = make_study(shifts=BETTER)
  rows = table.rows(study)
  by_name = {row['name']: row for row in rows}
  checks = claims.checks(study, rows)
  clear = check_of(checks, 'btx beats seed on code')
  assert (claims.verdict(clear), clear['close'], clear['units']) == ('met', False, 30)
  assert clear['difference'] == pytest.approx(-0.3 / math.log(2), abs=0.03)
  assert clear['error'] < by_name['seed']['error']['bits_per_byte']['code'] / 5
  assert clear['name'] == (
      f'btx beats seed on code ({-clear["difference"]:.3f} ±{clear["error"]:.3f})')
  near = check_of(checks, 'btx is within 0.01 of seed on prose')
  assert near['met'] == (near['difference'] <= near['limit'] == 0.01) and near['close']
  assert near['name'].endswith(f' ±{near["error"]:.3f}, within two errors of 0.01)')
  mean = check_of(checks, 'btx has the lowest mean')
  rival = min((name for name in by_name if name != 'btx'), key=lambda name: by_name[name]['mean'])
  found = table.difference_of_means(by_name['btx'], by_name[rival])
  assert found.error == pytest.approx(math.hypot(*(
      table.difference(by_name['btx'], by_name[rival], domain).error
      for domain in studies.WORDS)) / 3)
  assert claims.verdict(mean) == 'met'
  assert mean['name'].endswith(f'({-found.value:.3f} ±{found.error:.3f} below {rival})')


def test_below_twenty_units_there_is_too_little_text_to_tell(make_study):
  few, enough = (claims.checks(study, table.rows(study))
                 for study in (make_study(count, BETTER) for count in (19, 20)))
  assert {check['met'] for check in enough} == {True, False}
  assert {check['met'] for check in few} == {None}
  assert {claims.verdict(check) for check in few} == {'too little text to tell'}
  assert all(check['name'].endswith(', 19 units)') and '±' not in check['name'] for check in few)


def test_the_mean_over_seeds_has_the_error_of_its_text_and_their_spread(make_study):
  shifts = {('seed-1/btx', 'final', 'code'): -0.3, ('seed-0/btx', 'final', 'code'): -0.1}
  study = make_study(shifts=shifts, seeds=(0, 1))
  results = seeds.results(study)
  btx = results.rows[-1]
  nll = [scores.read(study, study.runs[f'seed-{s}/btx'], 'final')['code']['units']['nll']
         for s in (0, 1)]
  size = btx['units']['code']['bytes']
  assert btx['error']['bits_per_byte']['code'] == error_bars.error_of(
      {'nll': np.mean(nll, 0).tolist(), 'bytes': size})
  check = check_of(results.checks, 'btx beats seed on code')
  assert check['error'] == table.difference(btx, results.rows[0], 'code').error
  assert check['name'].endswith(f'±{check["error"]:.3f}): met in 2 of 2 seeds')
  assert 'The ± beside a score is another' in measured.about(results.rows)
  few = seeds.results(make_study(19, shifts, seeds=(0, 1))).checks
  assert {check['met'] for check in few} == {None}


def test_what_was_measured_stands_below_the_table_and_in_the_report(make_study):
  study = make_study(shifts=BETTER)
  for run in study.runs.values():
    manifest.write(study.folder(run.name), manifest.begin(run.name, run.spec()))
  results = seeds.results(study)
  errors = sorted(row['error']['bits_per_byte']['code'] for row in results.rows)
  size = sum(results.rows[0]['units']['code']['bytes'])
  cells = ['code', '7', f'{size:,}', '5,000', '30', f'{errors[0]:.3f} to {errors[-1]:.3f}']
  assert measured.cells(results.rows)[0] == cells
  path = report.write_report(study, 'tiny')
  with open(path.replace('html', 'json'), encoding='utf-8') as file:
    found = json.load(file)
  assert found['rows'][0]['error'] == results.rows[0]['error']
  assert found['checks'] == results.checks and 'units' not in found['rows'][0]
  with open(path, encoding='utf-8') as file:
    page = file.read()
  change = found['regressions'][0]['changes'][0]
  percent = f'{change["percent"]:+.2f} ±{change["percent_error"]:.2f}'
  for cell in [*cells[1:], measured.errors(results.rows)[-1][-1], percent]:
    assert f'<td>{cell}</td>' in page
  assert page.count('<b class="good">met</b>') == sum(check['met'] for check in results.checks)


def test_scores_of_an_earlier_version_are_shown_without_errors(make_study):
  study = make_study(shifts=BETTER, old=('seed',))
  results = seeds.results(study)
  check = check_of(results.checks, 'btx beats seed on code')
  assert (check['met'], check['error'], check['units']) == (True, None, None)
  assert check['name'] == f'btx beats seed on code ({-check["difference"]:.3f})'
  assert check_of(results.checks, 'btx is within 0.05 of expert/code')['error'] > 0
  assert 'without errors: seed. To measure' in measured.about(results.rows)
  assert measured.errors(results.rows)[0][0] == 'expert/code'
  study = make_study(old=study.runs)
  assert measured.cells(table.rows(study))[0] == [
      'code', '-', f'{text_of(30)[0].sum():,}', '5,000', '-', '-']
  assert claims.about(seeds.results(study).checks) == ''
