"""Hostile and odd files: each is accepted, or refused with one message, within seconds, and without
waiting or filling the memory. `python -m tests.fuzz` makes many more; rows are what it found."""

import gzip
import json
import os
import random
import socket
import struct

import pytest

from btx_jax.commands import prompts
from btx_jax.convert.hugging_face import Folder
from btx_jax.data import corpora, parser_check, tokenizer
from btx_jax.data.chat_template import ChatTemplate
from btx_jax.data.domains import Domain
from btx_jax.data.records import Document
from btx_jax.errors import UsageError
from btx_jax.files import inputs, shapes
from btx_jax.study import manifest
from btx_jax.training import metrics
from tests import fuzz, fuzz_inputs, fuzz_targets, make_tokenizers, odd_folders

DEEP = '[' * 100_000 + ']' * 100_000


@pytest.mark.parametrize('kind, count', [
    ('models', 100), ('documents', 60), ('prompts', 120), ('templates', 150), ('configs', 20),
    ('tokenizers', 30), ('workdirs', 4)])
def test_odd_inputs_are_accepted_or_refused_with_a_message(kind, count, monkeypatch):
  monkeypatch.setattr(fuzz_targets, '_run_in_fork', lambda package, raw: '')
  monkeypatch.setattr(parser_check, '_run', parser_check._run)  # the target replaces it
  target = fuzz_targets.KINDS[kind]()
  for number in range(count):
    outcome = fuzz.read(target, *fuzz.make(target, kind, 7, number))
    assert outcome.is_fine, f'python -m tests.fuzz --kind={kind} --seed=7 --only={number}'


def test_the_examples_that_are_damaged_are_sound_themselves():
  for kind in ('models', 'prompts'):
    target = fuzz_targets.KINDS[kind]()
    for example in target.examples:
      files = {name: tree if serialise is None else serialise(tree, fuzz_inputs.AsIs())
               for name, (tree, serialise) in example.items()}
      assert fuzz.read(target, files, random.Random(1)).name == 'accepted', (kind, files)


@pytest.fixture
def model(tmp_path):
  return odd_folders.plain(tmp_path / 'model')


def header(folder, entries):
  """Replaces the tensors of a folder by a header alone."""
  raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
  with open(os.path.join(folder, 'model.safetensors'), 'wb') as file:
    file.write(struct.pack('<Q', len(raw)) + raw)


def empty(shape):
  return {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, 0]}


@pytest.mark.parametrize('entries, message', [
    (lambda: {str(i): empty([0]) for i in range(290_000)}, 'more than 2,000,000 values'),
    (lambda: {'a': empty([2**62] * 100_000)}, 'a lacks a valid dtype, shape'),
    (lambda: {'a': empty([10**1000, 0])}, 'a lacks a valid dtype, shape'),
    (lambda: f'{{"a": {DEEP}}}'.encode(), 'nested too deeply'),
    (lambda: b'{%s}' % b','.join(b'"%d": 0' % (i // 2) for i in range(100_000)),
     '0 appears twice')])
def test_headers_that_would_take_long_are_refused(model, entries, message):
  header(model, entries())
  with pytest.raises(UsageError, match=message):
    Folder(model)


@pytest.mark.parametrize('change, message', [
    ({'num_hidden_layers': 10**9}, r'a model of 9,000,000,003 tensors .* the files have 21'),
    ({'num_hidden_layers': 10**30}, 'num_layers = 1000000000000000000000000000000 must be at most'),
    ({'rms_norm_eps': float('nan')}, 'norm_eps = nan must be positive and finite'),
    ({'rms_norm_eps': -1e-5}, 'norm_eps = -1e-05 must be positive and finite'),
    ({'rope_theta': 0, 'rope_parameters': None}, 'rope_theta = 0.0 must be positive and finite'),
    ({'rope_theta': float('inf'), 'rope_parameters': None}, 'rope_theta = inf must be positive'),
    ({'hidden_size': 0}, 'dim = 0 must be at least 1'), ({'head_dim': []}, r'head_dim = \[\]'),
    ({'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0, 'rope_theta': 1e4,
                          'low_freq_factor': 4.0, 'high_freq_factor': 4.0}}, 'must be below')])
def test_numbers_of_a_config_json_are_in_range(model, change, message):
  path = os.path.join(model, 'config.json')
  with open(path, encoding='utf-8') as file:
    found = json.load(file)
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(found | change, file)
  with pytest.raises(UsageError, match=message):
    Folder(model)


def test_a_path_with_a_nul_character_is_refused():
  with pytest.raises(UsageError, match='NUL'):
    tokenizer.load('a\0b')
  with pytest.raises(OSError, match='NUL'):
    inputs.open_file('a\0b')


def _socket(path):
  with socket.socket(socket.AF_UNIX) as made:
    made.bind(path)


def _sparse(path):
  with open(path, 'wb') as file:
    file.truncate(1 << 40)


IRREGULAR = {'named pipe': os.mkfifo, 'socket': _socket, 'directory': os.mkdir,
             'device': lambda path: os.symlink('/dev/zero', path),
             'more than': _sparse,
             'symbolic links': lambda path: os.symlink(path, path)}


@pytest.mark.parametrize('message', IRREGULAR)
def test_what_is_no_regular_file_is_refused_at_once(model, tmp_path, monkeypatch, message):
  monkeypatch.chdir(tmp_path)  # the path of a socket is short
  os.remove(os.path.join(model, 'config.json'))
  for name, read in (
      ('model/config.json', lambda path: Folder(model)),
      ('a.jsonl', prompts.of_file), ('tokenizer.json', tokenizer.load),
      ('manifest.json', lambda path: manifest.read('.'))):
    IRREGULAR[message](name)
    with pytest.raises(UsageError, match=rf'(?i){message}|No such file|is not'):
      read(name)
  IRREGULAR[message]('metrics.jsonl')
  if message != 'more than':
    assert metrics.read('.') == []


@pytest.mark.parametrize('make, message', [
    (os.mkfifo, 'matches no file'), (IRREGULAR['socket'], 'matches no file'),
    (IRREGULAR['device'], 'matches no file')])
def test_text_is_read_from_regular_files(tmp_path, monkeypatch, make, message):
  monkeypatch.chdir(tmp_path)
  make('a.txt')
  with pytest.raises(UsageError, match=message):
    [*corpora.documents(Domain('x', paths=('a.txt',)))]


def test_a_compressed_file_of_far_more_bytes_costs_one_record(tmp_path):
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b' ' * 70_000_000, 1))
  (tmp_path / 'b.txt').write_text('text')
  found = [*corpora.documents(Domain('x', paths=(str(tmp_path),)), max_skipped=0.5)]
  assert [document.text for document in found] == ['text']


def test_a_table_with_text_that_is_not_utf8_costs_its_rows_only(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  broken = pa.array([b'a\xf4', b'b']).view(pa.string())
  parquet.write_table(pa.table({'text': ['x', 'y'], 'id': broken}), tmp_path / 'a.parquet')
  domain = Domain('x', paths=(str(tmp_path / 'a.parquet'),), id_field='id')
  for reader in (None, lambda record, place, fields: Document(record['text'], record['id'])):
    found = [*corpora.documents(domain, 0.5, reader=reader)]
    assert [(document.text, document.id) for document in found] == [('y', 'b')]


def test_a_table_with_a_column_whose_name_is_not_utf8_is_damaged(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'text': ['x'], 'other': ['y']}), path, store_schema=False)
  path.write_bytes(path.read_bytes().replace(b'other', b'oth\xf3r'))
  (tmp_path / 'b.txt').write_text('sound')
  found = [*corpora.documents(Domain('x', paths=(str(tmp_path),)), max_skipped=0.5)]
  assert [document.text for document in found] == ['sound']


def test_offsets_outside_of_the_memory_cost_their_rows_only(tmp_path):
  pa = pytest.importorskip('pyarrow')
  offsets = pa.py_buffer(struct.pack('<4i', 0, 1, 1 << 30, 3))
  texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b'abc')])
  batch = pa.record_batch({'text': texts})
  with pa.ipc.new_file(str(tmp_path / 'a.arrow'), batch.schema) as writer:
    writer.write_batch(batch)
  domain = Domain('x', paths=(str(tmp_path / 'a.arrow'),))
  assert [document.text for document in corpora.documents(domain, 0.9)] == ['a']


@pytest.mark.parametrize('source', [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    "{{ 'x' | center(10**9) }}", "{{ 'a' | indent(10**9) }}", "{{ 'a'.ljust(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10**9) }}", "{{ 'a'.expandtabs(10**9) }}", "{{ (1).to_bytes(10**9) }}",
    "{{ ['a'] | batch(10**9, 'x') | list }}", "{{ messages | tojson(indent=10**9) }}",
    "{{ 'a' | replace('', 'b' * 3999999) }}", "{{ ('a ' * 1999999).split() }}",
    "{{ ('a ' * 1999999) | sort }}", "{{ range(99999) | map('string') | map('center', 9999) | list "
    '}}', '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', '{{ ' + '(' * 500 + ')' * 500 + ' }}',
    *(f"{{% set n = namespace(a='xx') %}}{{% for i in range(99) %}}{change}{{% endfor %}}"
      for change in ('{% set n.a = n.a ~ n.a %}', '{% set n.a = n.a + n.a %}',
                     '{% set n.a = [n.a, n.a] | join %}', "{% set n.a = ''.join([n.a, n.a]) %}",
                     "{% set n.a = '%s%s' % (n.a, n.a) %}", "{% set n.a = '{0}{0}'.format(n.a) %}",
                     '{% set n.a %}{{ n.a }}{{ n.a }}{% endset %}'))])
def test_a_template_cannot_take_long_or_fill_the_memory(source, monkeypatch):
  from btx_jax.data import sandbox
  monkeypatch.setattr(sandbox, 'MAX_SECONDS', 0.3)
  with pytest.raises(UsageError):
    ChatTemplate(source, {}, 'x').render([{'role': 'user', 'content': 'Hi'}])


def test_a_parser_that_ends_the_process_is_a_message(tmp_path, monkeypatch):
  folder = make_tokenizers.write(tmp_path / 'tokenizer', make_tokenizers.byte_level(),
                                 tokenizer_config={'eos_token': '</s>'})
  monkeypatch.setattr(parser_check, '_folder', lambda: str(tmp_path / 'cache'))
  tokenizer.load(str(folder))
  assert len(os.listdir(tmp_path / 'cache')) == 1
  ran = []
  monkeypatch.setattr(parser_check, '_run', lambda *given: ran.append(given) or '')
  tokenizer.load(str(folder))
  assert not ran, 'a file that passed is not tried again'
  monkeypatch.undo()
  monkeypatch.setattr(parser_check, '_folder', lambda: str(tmp_path / 'other'))
  monkeypatch.setattr(parser_check, '_CHILD', 'import os; os.abort()')
  with pytest.raises(UsageError, match=r'tokenizers ends the process \(SIGABRT\)'):
    tokenizer.load(str(folder))


def test_json_is_bounded():
  assert inputs.parse_json(b'{"a": [1, 2]}', 5) == {'a': [1, 2]}
  for raw, message in ((b'[1, 2, 3, 4, 5, 6]', 'more than 5 values'), (DEEP.encode(), 'than 5'),
                       (b'{"a": 1, "a": 2}', 'a appears twice'), (b'\xff', 'utf-8')):
    with pytest.raises(ValueError, match=message):
      inputs.parse_json(raw, 5)
  with pytest.raises(ValueError, match='nested too deeply'):
    inputs.parse_json(DEEP.encode())


@pytest.mark.parametrize('value, shape, words', [
    ({'a': 1}, {'a': float, 'b?': str}, ''), ({'a': True}, {'a': int}, 'a = True is not an int'),
    ({}, {'a': int}, 'a is missing'), ({'a': [1, 'x']}, {'a': [float]}, "a[1] = 'x' is not a num"),
    ({'a': {'b': None}}, {str: {'b': (None, int)}}, ''), ([], {}, 'it = [] is not an object'),
    ({'a': 'x' * 99}, {'a': (int, [str])}, "a = 'xxx")])
def test_shapes_name_what_does_not_fit(value, shape, words):
  assert shapes.misfit(value, shape)[:len(words) or None] == words
