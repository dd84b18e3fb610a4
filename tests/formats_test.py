"""Whatever a text is kept in, its documents are the same; broken records do not stop the rest."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc

from array_record.python.array_record_module import ArrayRecordWriter
import pyarrow as pa
from pyarrow import parquet
import pytest
import zstandard

from btx_jax.data import corpora, formats, records, streams, tables, text, tokenizer, tokens
from btx_jax.data.records import Document
from btx_jax.errors import UsageError
from btx_jax.study.study import Study
from tests import studies

TEXTS = ['the first\nof them', '日本語 \U0001F389', '  \t spaces\r\n', 'x' * 3000, 'the last']
RECORDS = [{'body': text, 'id': f'document {i}', 'size': i} for i, text in enumerate(TEXTS)]
LINES = [json.dumps(record) for record in RECORDS]

COMPRESS = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress,
            'zst': zstandard.compress}


def write(path, content):
  """A file of this ending that holds `content`: records, lines, or bytes."""
  name = str(path)
  kind = name.lower()
  if kind.endswith('.parquet'):
    parquet.write_table(pa.Table.from_pylist(content), name, row_group_size=2,
                        use_dictionary=False, compression='none', write_statistics=False,
                        write_page_checksum=True)
  elif kind.endswith('record'):
    writer = ArrayRecordWriter(name, 'group_size:2')
    for record in content:
      writer.write(record if isinstance(record, bytes) else record.encode())
    writer.close()
  else:
    raw = content if isinstance(content, bytes) else '\n'.join(content).encode()
    path.write_bytes(COMPRESS.get(kind.rpartition('.')[2], bytes)(raw))
  return name


def files(*paths, **fields):
  return corpora.Domain('some', paths=tuple(map(str, paths)), **fields)


def read(domain, max_skipped=1.0):
  """The texts of a domain and its tally."""
  tally = corpora.Tally()
  return [doc.text for doc in corpora.documents(domain, max_skipped, tally)], tally


def good(number):
  """So many lines without fault."""
  return [json.dumps({'text': f'good {i}'}) for i in range(number)]


# Formats


@pytest.mark.parametrize('name', [
    'x.jsonl', 'x.jsonl.gz', 'x.parquet', 'x.arrayrecord', 'x.array_record', 'x.json', 'x.ndjson',
    'x.jsonlines', 'x.JSONL', 'x.json.gz', 'x.jsonl.zst', 'x.ndjson.bz2', 'x.JsonLines.xz',
    'x.JSONL.GZ', 'x.PARQUET', 'x.ArrayRecord', 'x.txt', 'x.txt.zst', 'x'])
def test_every_format_gives_the_same_documents(tmp_path, name):
  path = write(tmp_path / name, RECORDS if name.lower().endswith('.parquet') else LINES)
  read = list(formats.read(path, 'body', 'id'))
  assert read == [Document(text, f'document {i}', f'{path}:{i + 1}')
                  for i, text in enumerate(TEXTS)]
  numbers = [document.id for document in formats.read(path, 'body', 'size')]
  assert numbers == ['0', '1', '2', '3', '4']
  assert {document.id for document in formats.read(path, 'body')} == {''}


@pytest.mark.parametrize('name, ending', [
    ('x.jsonl', 'gz'), ('x.gz', 'jsonl'), ('x.jsonl.gz', 'xz'), ('x.json', 'parquet'),
    ('blob', 'zst'), ('blob', 'parquet'), ('x.txt', 'arrayrecord')])
def test_a_misleading_name_does_not_matter(tmp_path, name, ending):
  content = RECORDS if ending == 'parquet' else LINES
  os.rename(write(tmp_path / f'y.{ending}', content), tmp_path / name)
  assert [doc.text for doc in formats.read(str(tmp_path / name), 'body', 'id')] == TEXTS


@pytest.mark.parametrize('stream', [True, False])
def test_arrow_files_as_datasets_saves_them_are_read(tmp_path, stream):
  table = pa.table({'text': TEXTS, 'meta': [{'url': text[:3]} for text in TEXTS]})
  new = pa.ipc.new_stream if stream else pa.ipc.new_file
  with new(str(tmp_path / 'data-00000-of-00001.arrow'), table.schema) as writer:
    writer.write_table(table, max_chunksize=2)
  found = list(formats.read(str(tmp_path / 'data-00000-of-00001.arrow'), id_field='meta.url'))
  assert [(doc.text, doc.id) for doc in found] == [(text, text[:3]) for text in TEXTS]


def test_an_array_record_of_plain_text(tmp_path):
  path = write(tmp_path / 'x.arrayrecord', TEXTS)
  assert [document.text for document in formats.read(path, text_field='')] == TEXTS


@pytest.mark.parametrize('kind', [
    pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
  column = (pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind)
            else pa.array([text.encode() for text in TEXTS], pa.binary()).cast(kind))
  parquet.write_table(pa.table({'text': column}), tmp_path / 'x.parquet')
  assert [doc.text for doc in formats.read(str(tmp_path / 'x.parquet'))] == TEXTS


@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 1000])
@pytest.mark.parametrize('separator', ['', '\n', '\n\n\n', '--', '日'])
def test_a_stream_is_cut_as_the_whole_text_would_be(tmp_path, monkeypatch, chunk, separator):
  monkeypatch.setattr(streams, 'CHUNK', chunk)
  content = 'a\n\n\n\nb--\n---c\n\n\n日本日\n\n\n\n\n\nend--'
  path = write(tmp_path / 'x.txt', content.encode())
  read = [doc for doc in formats.read(path, separator=separator) if doc.text]
  assert [doc.text for doc in read] == [
      part for part in (content.split(separator) if separator else [content]) if part]
  lines = content.split('\n')
  for doc in read:  # the place is the line where the document begins
    line = int(doc.place.rsplit(':', 1)[1])
    assert '\n'.join(lines[line - 1:])[:200].find(doc.text) >= 0


@pytest.mark.parametrize('chunk', [1, 2, 5, 1000])
@pytest.mark.parametrize('separator', ['\n', '\n\n\n', '\r\n\r\n', '\n--\n', '--\n'])
def test_line_ends_of_any_convention_separate(tmp_path, monkeypatch, chunk, separator):
  monkeypatch.setattr(streams, 'CHUNK', chunk)
  content = '\ufeffa\n\n\n\nb\n--\nc\nd\n\n\n日\n\n--\n\nend\n'
  parts = [part for part in content[1:].split(separator.replace('\r\n', '\n')) if part]
  for number, end in enumerate(['\n', '\r\n', '\r']):
    path = write(tmp_path / f'{number}.txt', content.replace('\n', end).encode())
    found = [doc for doc in formats.read(path, separator=separator) if doc.text]
    assert [doc.text for doc in found] == [part.replace('\n', end) for part in parts]
    lines = content[1:].split('\n')
    for doc, part in zip(found, parts):
      line = int(doc.place.rsplit(':', 1)[1])
      assert '\n'.join(lines[line - 1:]).find(part) >= 0 and part[0] in (*lines[line - 1], '\n')
  mixed = write(tmp_path / 'mixed.txt', b'a\r\n\nb\n\rc\r\rd\r\ne\n\n')
  assert [doc.text for doc in formats.read(mixed, separator='\n\n') if doc.text] == [
      'a', 'b', 'c', 'd\r\ne']


@pytest.mark.parametrize('name', ['x.jsonl', 'x.txt', 'x.json.gz'])
@pytest.mark.parametrize('end', ['\r\n', '\r', '\n\ufeff'])  # the last: files put together
def test_a_byte_order_mark_and_line_ends_cost_no_record(tmp_path, name, end):
  path = write(tmp_path / name, ('\ufeff' + end.join(LINES)).encode())
  assert [doc.text for doc in formats.read(path, 'body')] == TEXTS
  assert [doc.place for doc in formats.read(path, 'body')] == [f'{path}:{i}' for i in range(1, 6)]


def test_plain_text_begins_after_its_byte_order_mark(tmp_path):
  paths = [write(tmp_path / name, '\ufefftext'.encode()) for name in ('a.txt', 'b.txt.xz')]
  paths.append(write(tmp_path / 'c.txt', b'\xef\xbb\xbf'))
  texts, tally = read(files(*paths))
  assert texts == ['text'] * 2
  assert tally.first == [f'{paths[2]}: is empty']


def test_a_separator_that_is_never_found_is_said(tmp_path):
  paths = [write(tmp_path / f'{i}.txt', [f'text {i}\n\nmore']) for i in range(3)]
  domain = files(*paths, separator='\n\n\n')
  assert read(domain)[1].notes(domain) == [
      "the separator '\\n\\n\\n' was found in none of the 3 plain text files, so each is one "
      'document']
  found = domain._replace(separator='\n\n')
  assert read(found)[1].notes(found) == []
  lines = files(write(tmp_path / 'x.jsonl', good(3)), separator='\n\n')
  assert 'only plain text is cut' in read(lines)[1].notes(lines)[0]


@pytest.mark.parametrize('fields, message', [
    ({'text_field': 'bodi'}, r"has no column 'bodi'; its fields: 'body', 'id', 'size', 'tags'. Set "
                             r"text_field: did you mean 'body'\?"),
    ({'text_field': 'body', 'id_field': 'idd'}, r"Set id_field: did you mean 'id'\?"),
    ({'text_field': 'size'}, "'size' holds int64, not text"),
    ({'text_field': 'tags'}, "'tags' holds list<.*, not text"),
])
def test_a_parquet_file_without_the_column_is_refused(tmp_path, fields, message):
  path = write(tmp_path / 'x.parquet', [record | {'tags': ['a']} for record in RECORDS])
  with pytest.raises(UsageError, match=rf'domains\.some: .*x\.parquet.*{message}'):
    read(files(path, **fields))


@pytest.mark.parametrize('ending', ['jsonl', 'parquet'])
def test_fields_within_fields_are_reached(tmp_path, ending):
  rows = [{'meta': {'text': 'a', 'more': {'url': 'u'}}, 'meta.id': 1, 'n': 0},
          {'meta': None, 'meta.id': 2, 'n': 1}, {'meta': {'text': 'c', 'more': None}, 'meta.id': 3}]
  path = write(tmp_path / f'x.{ending}', rows if ending == 'parquet' else map(json.dumps, rows))
  read = lambda **fields: [
      (doc.text, doc.id) if isinstance(doc, Document) else doc.reason
      for doc in formats.read(path, 'meta.text', **fields)]
  assert read(id_field='meta.id') == [('a', '1'), records.NO_TEXT, ('c', '3')]  # as it is written
  assert read(id_field='meta.more.url') == [('a', 'u'), records.NO_TEXT, ('c', '')]


def test_a_column_within_a_struct_is_suggested(tmp_path):
  path = write(tmp_path / 'x.parquet', [{'meta': {'text': 'a'}, 'tags': [{'t': 'x'}]}])
  with pytest.raises(UsageError, match=r"its fields: 'meta', 'meta.text', 'tags'. Set text_field: "
                                       r"did you mean 'meta.text'\?"):
    read(files(path, text_field='meta.txt'))


def test_lists_of_texts_are_refused_with_the_way_out(tmp_path):
  path = write(tmp_path / 'x.jsonl', ['{"text": ["a", "b"]}'] * 9)
  with pytest.raises(UsageError, match=r"has a list in field [^$]*join the items of each list"):
    read(files(path))
  path = write(tmp_path / 'x.parquet', [{'text': ['a', 'b']}])
  with pytest.raises(UsageError, match=r'holds list<.*join the items of each list into one text'):
    read(files(path))


@pytest.mark.parametrize('name, content, fields, message', [
    ('x.txt', 'some prose', {'text_field': 'body'}, r"x.txt is plain text.*'body' \(text_field"),
    ('x.txt.gz', 'prose', {'id_field': 'url'}, r"x.txt.gz is plain text, .*'url' \(id_field\)"),
    ('x.md', '[1] prose', {'text_field': 'meta.text'}, r"x.md is plain text, .*'meta.text'"),
    ('x.jsonl', '{"text": "a"}', {'text_field': ''}, "x.jsonl holds JSON, and text_field = ''"),
    ('x.arrayrecord', 'prose', {'text_field': '', 'id_field': 'url'}, "is plain text, .*'url'"),
])
def test_a_field_that_a_file_cannot_have_is_an_error(tmp_path, name, content, fields, message):
  write(tmp_path / 'a.jsonl', ['{"body": "a", "meta": {"text": "b"}, "text": "", "url": "c"}'] * 9)
  path = write(tmp_path / name, [content])
  with pytest.raises(UsageError, match=rf'domains\.some: .*{message}'):
    read(files(path, tmp_path / 'a.jsonl', **fields))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  (tmp_path / 'x.parquet').write_bytes(b'any')
  with pytest.raises(UsageError, match=r"pip install 'btx_jax\[parquet\]'"):
    read(files(tmp_path / 'x.parquet'))


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
  path = write(tmp_path / 'x.jsonl.zst', good(2))
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  with pytest.raises(UsageError, match=r"x.jsonl.zst: .*pip install 'btx_jax\[zstd\]'"):
    read(files(path))


def test_optional_packages_are_not_imported_before_they_are_needed():
  code = ('import sys; from btx_jax.data import text; '
          'print({"jax", "pyarrow", "array_record", "zstandard"} & set(sys.modules))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.stdout.strip() == 'set()', done.stderr


# Records that cannot be used


@pytest.mark.parametrize('line, message', [
    (b'{"text": ', 'is not JSON: Expecting value'),
    (b'[' * 100_000, 'is not JSON'),
    (b'{"body": "a", "n": 1}', "has no text in field 'text'; its fields: 'body', 'n'"),
    (b'{"text": null}', "has no text in field 'text' but null"),
    (b'{"text": 5}', "has no text in field 'text' but a int"),
    (b'["text"]', "has no text in field 'text': it is not an object but a list"),
    (b'{"text": "caf\xe9"}', r'is not UTF-8 text \(byte 13\)'),
    (b'{"text": "half \\ud83d"}', r'holds half of a surrogate pair \(character 5\)'),
])
@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz', 'arrayrecord'])
def test_a_broken_record_is_skipped_and_named_and_the_rest_goes_on(
    tmp_path, line, message, ending):
  lines = [line.encode() for line in good(20)]
  lines.insert(7, line)
  path = tmp_path / f'x.{ending}'
  write(path, lines if ending == 'arrayrecord' else b'\n'.join(lines))
  texts, tally = read(files(path), max_skipped=0.1)
  assert texts == [f'good {i}' for i in range(20)]
  assert tally.documents == 20 and tally.skipped == 1
  assert len(tally.first) == 1
  with pytest.raises(UsageError, match=rf'x\.{ending}:8: {message}'):
    read(files(path), max_skipped=0.01)


def test_nulls_and_broken_text_in_a_parquet_file_are_skipped(tmp_path):
  column = pa.array([b'one', None, b'caf\xe9', b'four'])
  parquet.write_table(pa.table({'text': column, 'id': ['a', 'b', 'c', None]}),
                      tmp_path / 'x.parquet')
  domain = files(tmp_path / 'x.parquet', id_field='id')
  tally = corpora.Tally()
  documents = list(corpora.documents(domain, 1.0, tally))
  assert [(doc.text, doc.id) for doc in documents] == [('one', 'a'), ('four', '')]
  assert [line.rsplit('/', 1)[1] for line in tally.first] == [
      "x.parquet:2: has no text in field 'text' but null",
      'x.parquet:3: is not UTF-8 text (byte 3)']


def test_broken_text_in_a_plain_file_is_named_by_its_own_line(tmp_path):
  path = write(tmp_path / 'x.txt', b'one\n\n\ntwo\nthree \xff\n\n\nfour')
  texts, tally = read(files(path, separator='\n\n\n'))
  assert texts == ['one', 'four']
  assert tally.first == [f'{path}:5: is not UTF-8 text (byte 10 of the document)']


@pytest.mark.parametrize('chunk', [64, 1 << 20])
@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz', 'txt', 'arrayrecord', 'parquet'])
def test_what_is_too_long_is_skipped(tmp_path, monkeypatch, ending, chunk):
  monkeypatch.setattr(records, 'MAX_BYTES', 1000)
  monkeypatch.setattr(streams, 'CHUNK', chunk)
  around = 0 if ending in ('txt', 'parquet') else len(json.dumps({'text': ''}))
  # The second is as long as may be.
  texts = ['one', 'y' * (1000 - around), 'two', 'x' * (1001 - around), 'three']
  content = {'txt': texts, 'parquet': [{'text': text} for text in texts]}.get(
      ending, [json.dumps({'text': text}) for text in texts])
  path = write(tmp_path / f'x.{ending}', content)
  found, tally = read(files(path, separator='\n'))
  assert found == [*texts[:3], 'three']
  assert tally.first == [f'{path}:4: is too long: more than 0.001 MB']


def test_lines_are_counted_in_what_is_too_long_too(tmp_path, monkeypatch):
  monkeypatch.setattr(records, 'MAX_BYTES', 50)
  monkeypatch.setattr(streams, 'CHUNK', 16)
  write(tmp_path / 'x.txt', b'one\n\n\n' + b'long\n' * 40 + b'\n\ntwo')
  places = [record.place.rsplit(':', 1)[1]
            for record in formats.read(str(tmp_path / 'x.txt'), separator='\n\n\n')]
  assert places == ['1', '4', '46']


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.gz', 'x.txt'])
def test_a_line_that_is_too_long_is_never_held_in_memory(tmp_path, monkeypatch, name):
  monkeypatch.setattr(records, 'MAX_BYTES', 1_000_000)
  size = 30_000_000
  beginning = b'' if name == 'x.txt' else b'{"text": "'
  write(tmp_path / name, beginning + b'x' * size + b'"}\n{"text": "after"}')
  tracemalloc.start()
  try:
    found = list(formats.read(str(tmp_path / name)))
    assert tracemalloc.get_traced_memory()[1] < size / 4
  finally:
    tracemalloc.stop()
  assert found[0].reason == records.TOO_LONG
  assert len(found) == (1 if name == 'x.txt' else 2)


@pytest.mark.parametrize('ending', ['jsonl.gz', 'txt.gz', 'txt.xz'])
def test_of_a_file_that_is_cut_off_what_came_before_counts(tmp_path, ending):
  rng = random.Random(0)
  lines = [json.dumps({'text': rng.randbytes(30).hex()}) for _ in range(200)]
  path = write(tmp_path / f'x.{ending}', lines)
  raw = (tmp_path / f'x.{ending}').read_bytes()
  whole, _ = read(files(path, separator='\n'))
  for kept in (len(raw) // 2, len(raw) - 4):
    (tmp_path / f'x.{ending}').write_bytes(raw[:kept])
    texts, tally = read(files(path, separator='\n'))
    assert len(texts) >= len(whole) * kept / len(raw) * 0.8
    assert texts[:-1] == whole[:len(texts) - 1]
    assert whole[len(texts) - 1].startswith(texts[-1])  # half a document of plain text is text
    assert tally.reasons == {records.CUT_OFF: 1}
    line = int(tally.first[0].removeprefix(f'{path}:').split(':')[0])
    assert len(texts) <= line <= len(texts) + 1


@pytest.mark.parametrize('ending', COMPRESS)
def test_members_of_a_compressed_file_are_read_up_to_the_damage(tmp_path, ending):
  members = [COMPRESS[ending]('\n'.join(good(9)).encode() + b'\n') for _ in range(3)]
  path = tmp_path / f'x.jsonl.{ending}'
  path.write_bytes(b''.join(members))
  assert len(read(files(path))[0]) == 27
  flipped = members[2][:20] + bytes(255 - byte for byte in members[2][20:])
  for last, reason in ((members[2][:-5], records.CUT_OFF), (flipped, records.DAMAGED)):
    path.write_bytes(b''.join(members[:2]) + last)
    texts, tally = read(files(path))
    assert len(texts) >= 18 and tally.reasons == {reason: 1}
    assert tally.first[0].startswith(f'{path}:{len(texts) + 1}: {reason}')


def test_zstd_of_long_windows_and_bombs_is_read_in_bounded_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(records, 'MAX_BYTES', 1_000_000)
  long = zstandard.ZstdCompressionParameters(window_log=28)
  raw = b'\n'.join([b'{"text": "first"}', b'0' * 40_000_000, b'{"text": "last"}'])
  (tmp_path / 'x.jsonl.zst').write_bytes(
      zstandard.ZstdCompressor(compression_params=long).compress(raw))
  tracemalloc.start()
  try:
    texts, tally = read(files(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 25_000_000
  finally:
    tracemalloc.stop()
  assert texts == ['first', 'last'] and tally.reasons == {records.TOO_LONG: 1}


def test_a_file_that_is_cut_off_within_a_character_keeps_those_before(tmp_path):
  raw = gzip.compress('日本'.encode(), compresslevel=0)
  (tmp_path / 'x.txt.gz').write_bytes(raw[:-9])  # the checks at the end, and a byte
  texts, tally = read(files(tmp_path))
  assert texts == ['日']
  assert tally.reasons == {records.CUT_OFF: 1}


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty'])
@pytest.mark.parametrize('ending', ['jsonl.gz', 'parquet', 'arrayrecord'])
def test_a_damaged_file_does_not_stop_the_others(tmp_path, monkeypatch, ending, damage):
  monkeypatch.setattr(tables, '_ROWS', 5)
  rng = random.Random(0)
  records = [{'text': rng.randbytes(900).hex()} for _ in range(99)]
  lines = [json.dumps(record) for record in records]
  path = tmp_path / f'a.{ending}'
  write(path, records if ending == 'parquet' else lines)
  write(tmp_path / 'b.jsonl', good(40))
  raw = bytearray(path.read_bytes())
  middle = len(raw) // 2
  raw[middle:middle + 200] = bytes(200)
  path.write_bytes({'cut': raw[:middle], 'flipped': raw, 'empty': b''}[damage])
  texts, tally = read(files(tmp_path))
  assert texts[-40:] == [f'good {i}' for i in range(40)]
  before = 20 if damage == 'flipped' or (damage, ending) == ('cut', 'jsonl.gz') else 0
  assert texts[:before] == [record['text'] for record in records[:before]]
  assert tally.skipped >= 1
  assert all(f'a.{ending}' in line for line in tally.first)
  if damage == 'empty':
    assert tally.first == [f'{path}: is empty']


def test_empty_files_are_never_too_many(tmp_path):
  for i in range(9):
    write(tmp_path / f'{i}.py', b'')
  write(tmp_path / 'some.py', b'x = 1')
  tally = corpora.Tally()
  assert len(list(corpora.documents(files(tmp_path), 0.1, tally))) == 1
  assert tally.skipped == 9


def test_an_empty_file_among_many_is_counted(tmp_path):
  for i in range(10):
    write(tmp_path / f'{i}.txt', [f'text {i}'])
  empty = [write(tmp_path / name, b'') for name in ('a.txt', 'b.txt.gz')]
  write(tmp_path / 'blank.txt', b' \n')  # left out as an empty document is, and no fault
  texts, tally = read(files(tmp_path), max_skipped=0.2)
  assert len(texts) == 10
  assert tally.first == [f'{path}: is empty' for path in empty]


# Too many of them


def test_too_many_are_refused_with_the_way_out(tmp_path):
  path = write(tmp_path / 'x.jsonl', [*good(17), *['{"body": "a"}'] * 2, 'nonsense'])
  with pytest.raises(UsageError) as caught:
    read(files(path), max_skipped=0.1)
  message = str(caught.value)
  for part in ('domains.some: 3 of the 20 records', 'data.max_skipped = 0.1.',
               f"{path}:18: has no text in field 'text'; its fields: 'body'",
               f'{path}:20: is not JSON', 'set domains.some.text_field',
               'raise data.max_skipped'):
    assert part in message
  assert len(read(files(path), max_skipped=0.15)[0]) == 17


def test_a_wrong_field_fails_before_all_is_read(tmp_path):
  path = write(tmp_path / 'x.jsonl', ['{"body": "a"}'] * 5000)
  tally = corpora.Tally()
  with pytest.raises(UsageError, match=r'100 of the 100 records.*\n.*\n.*\n.*\n.*and 97 more'):
    list(corpora.documents(files(path), 0.1, tally))
  assert tally.skipped == 100
  # But as long as they are few, many may be skipped.
  path = write(tmp_path / 'y.jsonl', [*good(5000), *['{"body": "a"}'] * 400])
  assert read(files(path), max_skipped=0.1)[1].skipped == 400


def test_nothing_usable_says_why(tmp_path):
  path = write(tmp_path / 'x.jsonl', ['{"body": "a", "title": "b"}'])
  with pytest.raises(UsageError, match=(
      r"domains\.some is empty: [^$]*x\.jsonl:1: has no text in field 'text'; its fields: "
      r"'body', 'title'\n[^$]*set domains\.some\.text_field")):
    read(files(path))
  path = write(tmp_path / 'long.txt', b'x' * 100)
  with pytest.MonkeyPatch.context() as patch, pytest.raises(
      UsageError, match=r'is too long[^$]*by domains\.some\.separator'):
    patch.setattr(records, 'MAX_BYTES', 10)
    read(files(path))


def test_training_a_tokenizer_hands_such_errors_on_as_they_are(tmp_path):
  path = write(tmp_path / 'x.jsonl', [*good(30), *['nonsense'] * 10])
  texts = (text for text, *_ in corpora.documents(files(path)))
  with pytest.raises(UsageError, match=r'^domains\.some: 10 of the 40 records'):
    tokenizer.train_tokenizer(texts, 290)


@pytest.mark.parametrize('share', [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(tmp_path, share):
  config = studies.get_config(tmp_path)
  config.data.max_skipped = share
  with pytest.raises(UsageError, match=r'data\.max_skipped = '):
    Study(config, str(tmp_path / 'work'))


# Beside the tokens


@pytest.fixture(scope='module')
def model():
  return tokenizer.train_tokenizer([f'the {i} of {j}\n' for i in range(50) for j in range(9)], 275)


def test_ids_are_kept_beside_the_tokens_and_change_nothing(tmp_path, model):
  records = [{'text': f'text {i}', 'id': f'"é{i}'} for i in range(40)] + [{'text': 'no id'}]
  path = write(tmp_path / 'x.jsonl', map(json.dumps, records))
  metas = {}
  for id_field in ('', 'id'):
    folder = str(tmp_path / f'tokens{id_field}')
    metas[id_field] = tokens.prepare(folder, files(path, id_field=id_field), model, 0.3)
  assert metas['']['hash'] == metas['id']['hash']
  assert not [name for name in os.listdir(tmp_path / 'tokens') if 'ids' in name]
  assert tokens.document_id(str(tmp_path / 'tokens'), 'train', 0) == ''
  id_of = {record['text']: record.get('id', '') for record in records}
  for split in tokens.SPLITS:
    part = tokens.load(folder, split)
    for i, (a, b) in enumerate(zip(part.starts, part.starts[1:])):
      assert tokens.document_id(folder, split, i) == id_of[model.decode(part.ids[a + 1:b - 1])]
    with open(os.path.join(folder, f'{split}.ids.jsonl'), encoding='utf-8') as file:
      assert len(file.readlines()) == part.num_documents
  with pytest.raises(UsageError, match='made from another config'):
    tokens.prepare(str(tmp_path / 'tokens'), files(path, id_field='id'), model, 0.3)


@pytest.mark.parametrize('number', [5, 500])
def test_an_id_field_that_no_document_has_is_refused(tmp_path, number):
  path = write(tmp_path / 'x.jsonl', good(number))
  with pytest.raises(UsageError, match=r"domains\.some\.id_field = 'url': none of the first"):
    read(files(path, id_field='url'))
  tally = corpora.Tally()
  with pytest.raises(UsageError):
    list(corpora.documents(files(path, id_field='url'), tally=tally))
  assert tally.documents == min(number, 100)  # and not after all of a large corpus


def test_a_folder_from_before_these_fields_stays_valid(tmp_path, model):
  path = write(tmp_path / 'x.jsonl', good(30))
  folder = tmp_path / 'tokens'
  meta = tokens.prepare(str(folder), files(path), model, 0.2)
  old = {  # word for word what was written then
      'made_from': {
          'domain': {'name': 'some', 'source': 'files', 'paths': [path], 'text_field': 'text',
                     'separator': ''},
          'framing': meta['made_from']['framing'], 'tokenizer': model.hash, 'held_out': 0.2,
          'text': f'1 files, {os.path.getsize(path)} bytes'},
      **{key: meta[key] for key in ('dtype', 'hash', 'train', 'held_out')}}
  assert meta['made_from'] == old['made_from']
  (folder / 'meta.json').write_text(json.dumps(old))
  assert tokens.prepare(str(folder), files(path), model, 0.2) == old


def test_what_was_skipped_is_told_once_a_domain_and_kept(tmp_path, capsys):
  studies.write_text(tmp_path)
  with open(tmp_path / 'code.jsonl', 'a', encoding='utf-8') as file:
    file.write('nonsense\n' * 5)
  config = studies.get_config(tmp_path)
  text.prepare(config, str(tmp_path / 'data'))
  output = capsys.readouterr().out
  lines = [line for line in output.splitlines() if 'skipped' in line]
  assert len(lines) == 1
  assert lines[0].startswith(
      f'code: 5 record(s) skipped: {tmp_path}/code.jsonl:61: is not JSON')
  assert lines[0].endswith('; and 2 more')
  with open(tmp_path / 'data' / 'code' / 'meta.json', encoding='utf-8') as file:
    skipped = json.load(file)['skipped']
  assert skipped['count'] == 5 and skipped['reasons'] == {'is not JSON': 5}
  assert len(skipped['first']) == 3


# Git LFS pointers

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'4d' * 32 + b'\nsize 123\n'


@pytest.mark.parametrize('content', [
    POINTER, POINTER.replace(b'\n', b'\r\n'), POINTER.replace(b'git-lfs', b'hawser')])
@pytest.mark.parametrize('name', ['x.jsonl.gz', 'x.parquet', 'x.txt'])
def test_a_git_lfs_pointer_is_refused_by_name(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UsageError, match=r'domains\.some: .*/x\.\S+ is a Git LFS pointer.* lfs pull'):
    read(files(tmp_path))


@pytest.mark.parametrize('content', [
    POINTER[:40], POINTER[:43] + b'is how such a pointer begins', POINTER + b'x' * 1000])
def test_text_about_git_lfs_pointers_is_text(tmp_path, content):
  (tmp_path / 'x.txt').write_bytes(content)
  assert read(files(tmp_path))[0] == [content.decode()]


# CSV


def rows_of(path, raw, **fields):
  """What a table gives: (text, id) of documents, reasons of the others with their lines."""
  path.write_bytes(gzip.compress(raw) if path.name.endswith('.gz') else raw)
  return [(each.text, each.id) if isinstance(each, Document)
          else f'{each.place.rsplit(":", 1)[-1]}: {each.reason}{each.detail}'
          for each in formats.read(str(path), **fields)]


@pytest.mark.parametrize('name, delimiter', [
    ('x.csv', ','), ('x.TSV', '\t'), ('x.csv', ';'), ('x.csv.gz', ',')])
def test_rows_of_a_table_are_documents(tmp_path, name, delimiter):
  rows = [['id', 'body'], ['1', f'two\nlines{delimiter} "quoted"'], ['2', 'caf\u00e9'], [],
          ['3'], ['4', 'the last']]
  text = io.StringIO(newline='')
  csv.writer(text, delimiter=delimiter).writerows(rows)
  raw = b'\xef\xbb\xbf' + text.getvalue().encode().replace(b'the', b'\xff')
  assert rows_of(tmp_path / name, raw, text_field='body', id_field='id') == [
      (rows[1][1], '1'), ('caf\u00e9', '2'),
      '6: is not a row of the table: it has 1 of 2 cells',
      '7: is not UTF-8 text (character 0 of the cell)']


@pytest.mark.parametrize('raw, expected', [
    # Commas that are not quoted, and quotes that do not match, cost their row only.
    (b'text,n\nHello, world,1\nbye,0', ['2: is not a row of the table: it has 3 of 2 cells',
                                       ('bye', '')]),
    (b'n,text\n1,"never closed\n2,two\n3,three\n',
     ['2: is not a row of the table: a quote is missing or out of place', ('two', ''),
      ('three', '')]),
    (b'n,text\n1,"said \\"hi\\" ok"\n2,two\n',
     ['2: is not a row of the table: a quote is missing or out of place', ('two', '')]),
    (b'text,n,,\nsome,1,,,,\n', [('some', '')]),
    # Headers as they come, and what concatenating files leaves.
    (b'\n n, text \n1,one\nn,text\n\xef\xbb\xbf"2","b, c"\n', [
        ('one', ''), ('b, c', '')]),
    (b'n,text\n1,a\nn,text\n2,b\n', [('a', ''), ('b', '')]),
    (b'sep=;\nn;text\n1;a, b\n', [('a, b', '')]),
    (b'text,"a;b;c;d"\nhello,x\n', [('hello', '')]),
    (b'"n","text","a\nb"\n1,one,2\n', [('one', '')]),
    (b'\xef\xbb\xbf\n', ['x.csv: is empty']),
])
def test_tables_as_people_have_them(tmp_path, raw, expected):
  found = rows_of(tmp_path / 'x.csv', raw)
  assert [each.replace(str(tmp_path) + '/', '') if isinstance(each, str) else each
          for each in found] == expected


def test_quotes_are_letters_in_a_table_with_tabs_that_does_not_quote(tmp_path):
  raw = b'n\ttext\n1\t"starts no end\n2\t"Quoted" he said\n3\tabc\n4\t"a\tb"\n'
  assert rows_of(tmp_path / 'x.tsv', raw) == [
      ('"starts no end', ''), ('"Quoted" he said', ''), ('abc', ''), ('a\tb', '')]


def test_a_table_without_the_column_is_refused_or_in_a_folder_left_out(tmp_path):
  path = write(tmp_path / 'labels.csv', b'name,label\na,1\n')
  with pytest.raises(UsageError, match=r"has no column 'text'; its fields: 'name', 'label'. Set"):
    read(files(path))
  write(tmp_path / 'x.txt', b'some text')
  texts, tally = read(files(tmp_path))
  assert texts == ['some text']
  assert tally.first == [f"{path}: is a table without column 'text'; its fields: 'name', 'label'"]
  assert [(group['name'], group['kind']) for group in tally.read_as()] == [
      ('x.txt', 'plain text'), ('labels.csv', 'no column')]


def test_a_row_that_is_too_long_is_one_record(tmp_path, monkeypatch):
  monkeypatch.setattr(records, 'MAX_BYTES', 100)
  raw = b'n,text\n1,' + b'x' * 150 + b',zz\n2,ok\n3,' + '\u00e9'.encode() * 60 + b'\n4,fine'
  assert rows_of(tmp_path / 'x.csv', raw) == [
      '2: is too long: more than 0.0001 MB', ('ok', ''), '4: is too long: more than 0.0001 MB',
      ('fine', '')]


@pytest.mark.parametrize('kept', [12, 30])  # in the header, and after it
def test_a_table_that_is_cut_off_does_not_stop_the_others(tmp_path, kept):
  raw = gzip.compress(b'n,text\n1,aaa\n2,bbb\n', compresslevel=0)
  (tmp_path / 'a.csv.gz').write_bytes(raw[:kept])
  write(tmp_path / 'b.csv', b'n,text\n1,good\n')
  texts, tally = read(files(tmp_path))
  assert texts[-1] == 'good'
  assert tally.reasons == {records.CUT_OFF: 1}


def test_a_number_of_too_many_digits_is_no_crash(tmp_path):
  path = write(tmp_path / 'x.jsonl', b'{"text": "a", "n": ' + b'9' * 5000 + b'}\n{"text": "b"}\n')
  texts, tally = read(files(path))
  assert texts == ['b'] and tally.reasons == {records.NOT_JSON: 1}


@pytest.mark.parametrize('raw', [
    b'{\n "a": 1\n}\n{\n "text": "bb"\n}\nThe above is JSON. Then prose follows\nand goes on.\n',
    b'[{"text": "a"}]\n[see note] prose follows,\nand goes on.\n'])
def test_prose_after_json_is_text(tmp_path, raw):
  assert rows_of(tmp_path / 'x.md', raw) == [(raw.decode(), '')]
