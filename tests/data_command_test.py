"""The command `data`: it finds all held-out text that is also in training text, and no other."""

import gzip
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from btx_jax.commands import data
from btx_jax.data import duplicates, splits
from btx_jax.data.tokens import Tokens
from btx_jax.files import sealed
from tests import studies
from tests.jobs import PATIENCE, ROOT

BEGIN, END = 1, 2


def split(documents, dtype=np.uint16, begins=1, ends=1):
  """A split of documents, given as lists of ids, as its files hold it."""
  marked = [[BEGIN] * begins + document + [END] * ends for document in documents]
  starts = np.cumsum([0, *map(len, marked)])
  return Tokens(np.array([i for ids in marked for i in ids], dtype), starts, starts, 'hash', begins,
                ends)


def windows_of(document, size):
  return [tuple(document[i:i + size]) for i in range(len(document) - size + 1)]


def expected(held_out, train, size):
  """Share of tokens and number of documents in overlaps, by comparing all windows."""
  seen = {w for documents in train.values() for document in documents
          for w in windows_of(document, size)}
  covered = [{i + j for i, w in enumerate(windows_of(document, size)) if w in seen
              for j in range(size)} for document in held_out]
  return (sum(map(len, covered)) / max(sum(map(len, held_out)), 1),
          sum(map(bool, covered)))


@pytest.mark.parametrize('chunk, together', [(7, 1), (16, 3), (1 << 12, 8)])
@pytest.mark.parametrize('seed', range(4))
def test_overlaps_are_those_that_a_comparison_of_all_windows_finds(
    monkeypatch, chunk, together, seed):
  size = 5
  monkeypatch.setattr(duplicates, 'RUN', size)
  monkeypatch.setattr(duplicates, '_CHUNK', chunk)
  monkeypatch.setattr(duplicates, '_TOGETHER', together)
  rng = np.random.default_rng(seed)
  marks = {'begins': seed % 2, 'ends': seed // 2}

  def documents(count):
    # Few distinct tokens, so that runs are shared by chance; some documents are too short.
    return [rng.integers(3, 6 + seed, rng.integers(1, 25)).tolist() for _ in range(count)]

  held_out = {'a': documents(8), 'b': documents(5), 'c': [[7, 7, 7]]}
  train = {'a': documents(20), 'b': documents(3)}
  found = duplicates.overlaps({name: split(d, **marks) for name, d in held_out.items()},
                              {name: split(d, np.uint32, **marks) for name, d in train.items()})
  shares = []
  for name in held_out:
    share, count = expected(held_out[name], train, size)
    shares.append(share)
    assert found[name].share == pytest.approx(share)
    assert found[name].documents == count
    example = found[name].example
    assert (example is not None) == bool(count)
    if example:
      run = tuple(example.ids.tolist())
      assert len(run) >= size
      assert run in windows_of(held_out[name][example.document], len(run))
      assert run in windows_of(train[example.domain][example.source], len(run))
  assert max(shares) > 0 and min(shares) < 1  # some text overlaps, and some does not


def test_50_shared_tokens_are_an_overlap_and_49_are_not():
  passage = list(range(100, 150))
  train = {'x': split([[7, *passage, 8]])}
  for length, share in ((49, 0.0), (50, 50 / 80)):
    held_out = {'y': split([[9] * 10, [*[5] * 15, *passage[:length], *[6] * (15 + 50 - length)]])}
    overlap = duplicates.overlaps(held_out, train)['y']
    assert overlap.share == pytest.approx(share * 80 / 90)
    assert overlap.documents == (length == 50)
  assert overlap.example == (1, 'x', 0, overlap.example.ids)
  assert overlap.example.ids.tolist() == passage


@pytest.mark.parametrize('begins, ends', [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_an_overlap_ends_with_its_document(begins, ends):
  passage = list(range(100, 160))
  train = {'x': split([passage[:30], passage[30:]], begins=begins, ends=ends)}
  held_out = {'x': split([passage, passage[:30], passage[30:]], begins=begins, ends=ends)}
  assert duplicates.overlaps(held_out, train)['x'] == (0.0, 0, None)


def test_copies_within_a_domain_are_counted():
  assert duplicates.copies(split([[5, 6], [5], [5, 6], [5, 6, 7], [5, 6], [5]])) == 3
  assert duplicates.copies(split([[5, 6], [6, 5]])) == 0


@pytest.fixture
def planted(tmp_path):
  """A small study whose held-out prose repeats a passage that code trains on."""
  rng = random.Random(0)
  studies.write_text(tmp_path)
  passage = ' '.join(f'{rng.choice(studies.WORDS["prose"])} {rng.randint(0, 99)}'
                     for _ in range(40))
  held = next(text for i in range(1000) if splits.share(text := f'{i} tells: {passage}!') < 0.1)
  train = next(text for i in range(1000) if splits.share(text := f'# {i}\n{passage}') >= 0.1)
  for name, text in (('prose', held), ('code', train), ('code', train)):
    with open(tmp_path / f'{name}.jsonl', 'a', encoding='utf-8') as file:
      file.write(json.dumps({'text': text, 'url': f'planted-{name}'}) + '\n')
  with open(tmp_path / 'math.jsonl', 'a', encoding='utf-8') as file:
    file.write('no record\n')
  config = studies.get_config(tmp_path)
  for name in ('prose', 'code'):
    config.domains[name].id_field = 'url'
  return config, passage


def test_the_planted_passage_is_found_and_named(planted, tmp_path):
  config, passage = planted
  code, math, prose = data.describe(config, str(tmp_path / 'data'))
  assert [d.name for d in (code, math, prose)] == ['code', 'math', 'prose']
  assert code.train['documents'] + code.held_out['documents'] == 62
  assert (code.copies, prose.copies) == (1, 0)
  assert math.skipped == 1
  assert prose.overlap.documents >= 1
  assert 0 < prose.overlap.share < 1
  assert prose.overlap.example.domain == 'code'
  assert "(id 'planted-prose')" in prose.example and "(id 'planted-code')" in prose.example
  assert passage[20:100] in prose.example
  with open(tmp_path / 'prose.jsonl', encoding='utf-8') as file:
    texts = [json.loads(line)['text'] for line in file]
  assert any(text.startswith(prose.sample) for text in texts)
  assert sum(splits.share(text) < 0.1 for text in texts) == prose.held_out['documents']


def test_the_command_reports_it_without_jax(planted, tmp_path):
  _, passage = planted
  path = tmp_path / 'small.py'
  path.write_text('import pathlib\nfrom tests import studies\n\ndef get_config():\n'
                  f'  config = studies.get_config(pathlib.Path({str(tmp_path)!r}))\n'
                  '  for name in ("prose", "code"):\n'
                  '    config.domains[name].id_field = "url"\n'
                  '  return config\n')
  (tmp_path / 'none' / 'jax').mkdir(parents=True)
  (tmp_path / 'none' / 'jax' / '__init__.py').write_text('raise ImportError("no jax here")')
  environment = {**os.environ, 'PYTHONPATH': f'{tmp_path / "none"}{os.pathsep}{ROOT}'}
  done = subprocess.run(
      [sys.executable, '-m', 'btx_jax.main', f'--config={path}', f'--workdir={tmp_path / "work"}',
       'data'], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
  assert done.returncode == 0, done.stderr
  assert 'seen: prose, held-out document' in done.stdout
  assert 'code, held-out document 0' in done.stdout
  assert passage[20:100] in done.stdout
  assert os.listdir(tmp_path / 'work') == ['data']


def test_folders_without_a_count_of_skipped_records_are_described(planted, tmp_path):
  config, _ = planted
  folder = str(tmp_path / 'data')
  data.describe(config, folder)
  path = os.path.join(folder, 'math', 'meta.json')
  meta = sealed.read(path)
  del meta['skipped']
  sealed.write(path, meta)
  domains = data.describe(config, folder)
  assert domains[1].skipped is None
  assert len(data.as_table(domains).rows) == 3


def test_one_table_of_80_columns_shows_what_was_read_as_what(tmp_path):
  rng = random.Random(0)
  texts = [' '.join(rng.choice(studies.WORDS['prose']) for _ in range(9)) for _ in range(30)]
  lines = '\n'.join(json.dumps({'text': text}) for text in texts[:10])
  folder = tmp_path / 'text'
  folder.mkdir()
  for name in ('c4-train.00000-of-01024.json.gz', 'c4-train.00001-of-01024.json.gz'):
    (folder / name).write_bytes(gzip.compress(f'{lines}\nbroken {name}'.encode()))
  (folder / 'array.json').write_text(json.dumps([{'text': text} for text in texts[10:20]]))
  (folder / 'prose.txt').write_text('\r\n\r\n'.join(texts[20:]))
  (folder / 'config.json').write_text('{"a": 1}')
  (folder / 'old.zip').write_bytes(b'PK\x03\x04')
  for name in ('README.md', '.gitattributes', '_SUCCESS', 'empty.txt'):
    (folder / name).write_text('')
  config = studies.get_config(tmp_path)
  studies.write_text(tmp_path)
  config.data.max_skipped = 0.5
  config.domains.prose.update(paths=(str(folder),), separator='\n\n')
  domains = data.describe(config, str(tmp_path / 'data'))
  console = Console(width=80, record=True, markup=False, file=io.StringIO())
  console.print(data.files_table(domains))
  rows = [' '.join(line.split()) for line in console.export_text().splitlines()]
  for row in ('code code.jsonl JSON lines 60 0', 'prose array.json JSON array 10 0',
              '*.json.gz (2) JSON lines, gzip 20 2', 'prose.txt plain text 10 0',
              'old.zip zip archive 0 1',
              'README.md left out: not data - -', '.gitattributes left out: hidden - -',
              '_SUCCESS left out: not data - -', 'config.json left out: no field - -',
              'empty.txt left out: empty - -'):
    assert row in rows
