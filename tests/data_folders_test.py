"""What a path names: data is read, and what describes it is left out beside it, by name."""

import os

import pytest

from btx_jax.data import corpora, folders
from btx_jax.errors import UsageError
from btx_jax.files import naming

ABOUT = ['README.md', 'LICENSE', 'LICENSE-MIT.txt', 'dataset_infos.json', 'dataset_info.json',
         '_SUCCESS', 'shard.jsonl.md5', 'part-0.crc', 'CITATION.cff', 'SHA256SUMS', 'x.jsonl.part',
         'notes.txt~', 'README.zh-CN.md', 'state.json', '_delta_log/0.json', '_common_metadata']
HIDDEN = ['.gitattributes', '.DS_Store', '.git', '.cache']


def make(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "x"}\n')


def names(found, folder):
  return sorted(os.path.relpath(path, folder) for path in found)


@pytest.mark.parametrize('shards', [
    ['a.jsonl'], ['data/train-0.parquet'], ['c4.0.json.gz', 'c4.1.json.gz'], ['x.json', 'y.json'],
    ['a.JSONL.zst', 'notes.txt', 'history.md'], ['data-0.arrow'], ['en/a.ndjson', 'de/b.ndjson']])
def test_what_describes_records_is_left_out_beside_them(tmp_path, shards):
  make(tmp_path, *shards, *ABOUT, '.gitattributes', '.DS_Store', '.git/config', '.cache/x/y.jsonl')
  for pattern in ('', '**'):
    found = folders.find(os.path.join(tmp_path, pattern))
    assert names(found.files, tmp_path) == sorted(shards)
    left = {os.path.relpath(path, tmp_path): reason for path, reason in found.left_out}
    assert left == dict.fromkeys(ABOUT, folders.ABOUT) | (
        {} if pattern else dict.fromkeys(HIDDEN, folders.HIDDEN))


@pytest.mark.parametrize('content', [
    ['README.md', 'LICENSE', 'src/main.py', 'package.json', 'NOTICE'],  # a project
    ['README.md', 'other/README.md', 'chapter.md'], ['README', 'a.txt', 'b.txt.gz'],
    ['state.json', 'README.md'], ['_SUCCESS', 'part-00000', 'part-00001']])
def test_without_records_these_files_are_text_like_any_other(tmp_path, content):
  make(tmp_path, *content, '.hidden')
  assert names(folders.find(str(tmp_path)).files, tmp_path) == sorted(content)


@pytest.mark.parametrize('path, read', [
    ('README.md', ['README.md']), ('README*', ['README.md']), ('*.md', ['README.md']),
    ('.h*', ['.hidden.txt']), ('a.*', ['a.jsonl']), ('*.*', ['a.jsonl', 'readmes.jsonl']),
    ('[ar]*.jsonl', ['a.jsonl', 'readmes.jsonl'])])
def test_what_is_named_is_read(tmp_path, path, read):
  make(tmp_path, 'a.jsonl', 'readmes.jsonl', 'README.md', '.hidden.txt')
  assert names(folders.find(str(tmp_path / path)).files, tmp_path) == read


@pytest.mark.parametrize('name', ['book [1999].txt', 'what?.txt', '*.txt', '[a]/b.txt'])
def test_a_path_that_exists_is_not_a_pattern(tmp_path, name):
  make(tmp_path, name, 'book 1.txt', 'whats.txt', 'a/b.txt')
  assert folders.find(str(tmp_path / name)).files == [str(tmp_path / name)]
  if '/' in name:
    assert folders.find(f'{tmp_path}/[a]/').files == [str(tmp_path / name)]


def test_a_link_to_nothing_is_named(tmp_path):
  make(tmp_path, 'a.jsonl')
  (tmp_path / 'b.jsonl').symlink_to(tmp_path / 'gone.jsonl')
  assert folders.find(str(tmp_path)).left_out == [
      (str(tmp_path / 'b.jsonl'), folders.BROKEN_LINK)]


def test_the_home_directory_is_found(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  make(tmp_path, 'data/a.jsonl')
  for path in ('~/data', '~/data/*.jsonl', '~/data/a.jsonl'):
    domain = corpora.Domain('some', paths=(path,))
    assert [doc.text for doc in corpora.documents(domain)] == ['x']
    assert corpora.describe(domain) == '1 files, 14 bytes'
  assert naming.local_path('--workdir', '~/x') == f'{tmp_path}/x'
  with pytest.raises(UsageError, match=r"--to = ~nobody-here/x: there is no such home directory"):
    naming.local_path('--to', '~nobody-here/x')


def test_pointers_of_what_is_no_data_do_not_stop_a_folder(tmp_path):
  pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
  make(tmp_path, 'code.py')
  (tmp_path / 'logo.png').write_text(pointer)
  domain, tally = corpora.Domain('some', paths=(str(tmp_path),)), corpora.Tally()
  assert len(list(corpora.documents(domain, 0, tally))) == 1
  assert corpora.left_out({'files': tally.read_as()}) == ['left out: logo.png: LFS pointer']
  for path in (tmp_path / 'logo.png', tmp_path / '*.png'):
    with pytest.raises(UsageError, match=r'logo\.png is a Git LFS pointer'):
      list(corpora.documents(domain._replace(paths=(str(path),))))
