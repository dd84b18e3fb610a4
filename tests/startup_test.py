"""Commands that only read files start at once: they import no library of training, and read the row
of a run once."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from btx_jax.files import sealed
from btx_jax.study import rows

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'tensorstore', 'tokenizers',
         'transformers', 'pyarrow', 'scipy', 'sklearn', 'matplotlib'}
PROGRAM = '''
import sys
from btx_jax import main
try:
  main.main(sys.argv)
except SystemExit as end:
  print('ended with', end.code, file=sys.stderr)
print('imported', *sys.modules)
'''


@pytest.mark.parametrize('arguments', [
    ['--help'], ['--config=demo', 'status'], ['--config=demo', 'jobs'],
    ['--config=demo', 'ledger'], ['--config=demo', 'rename', 'seed', 'other'],
    [f'--config={ROOT}/configs/study.py', 'status'],
    [f'--config={ROOT}/configs/study.py', 'rows']], ids=lambda found: ' '.join(found)[-16:])
def test_a_command_that_reads_files_imports_no_library_of_training(tmp_path, arguments):
  done = subprocess.run(
      [sys.executable, '-c', PROGRAM, f'--workdir={tmp_path}/none', *arguments], text=True,
      capture_output=True, cwd=ROOT, check=True)
  imported = {name.partition('.')[0] for name in done.stdout.rpartition('imported ')[2].split()}
  assert 'btx_jax' in imported
  assert imported & HEAVY == set()


def test_a_row_is_read_once_until_it_changes(tmp_path, monkeypatch):
  name, read, paths = 'dense/dense', sealed.read, []
  monkeypatch.setattr(sealed, 'read', lambda path: paths.append(path) or read(path))
  source = next((ROOT / 'docs' / 'study' / 'rows').rglob('*.json'))
  file = tmp_path / f'{name}.json'
  file.parent.mkdir()
  shutil.copy(source, file)
  row = rows.read(str(tmp_path), name)
  assert row == rows.read(str(tmp_path), name) and row is not None
  assert paths == [str(file)]
  rows.write(str(tmp_path), name, row | {'training': {'loss': 0.125}})
  assert rows.read(str(tmp_path), name)['training'] == {'loss': 0.125}
  os.remove(file)
  assert rows.read(str(tmp_path), name) is None
