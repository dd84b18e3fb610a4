"""Parses a tokenizer's file in a child process, before this process reads it.

The parsers of sentencepiece (C++) and tokenizers (Rust) crash on some damaged files, and may take
any amount of time and memory. A tokenizer may come from an unknown source. So a child process with
limits parses each file first, once: the hash of a file that it survives is kept in the user's cache
directory.
"""

from collections.abc import Mapping
import contextlib
import hashlib
from importlib import metadata
import os
import signal
import subprocess
import sys

from btx_jax.errors import UsageError
from btx_jax.files import writing

_SECONDS = 120  # the largest tokenizers take 2
_BYTES = 4 << 30  # of address space; the largest tokenizers take 1 GB
_PACKAGES = {'tokenizer.model': 'sentencepiece', 'tokenizer.json': 'tokenizers'}
# An exception is not a reason to refuse the file here: this process gets the same one, and reports
# it. A panic in Rust is not an Exception.
_CHILD = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
raw, text = sys.stdin.buffer.read(), 'The quick\\n\\n  br\\u00f6wn \\u65e5 </s>'
try:
  if sys.argv[1] == 'sentencepiece':
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    model.decode(model.encode(text))
  else:
    import tokenizers
    model = tokenizers.Tokenizer.from_str(raw.decode())
    model.get_vocab()
    model.decode(model.encode(text).ids)
except MemoryError:
  raise
except Exception:
  pass
'''


def check(files: Mapping[str, bytes], name: str, path: str) -> None:
  """Raises UsageError if a parser does not survive the file `name` of a tokenizer.

  Args:
    files: the tokenizer's files by name.
    name: 'tokenizer.model' or 'tokenizer.json'.
    path: its path, for the message.
  """
  package = _PACKAGES[name]
  try:
    version = metadata.version(package)
  except metadata.PackageNotFoundError:
    return  # whoever reads the file reports that
  passed = os.path.join(_folder(), hashlib.sha256(
      f'{package} {version} '.encode() + files[name]).hexdigest())
  if os.path.exists(passed):
    return
  ended = _run(package, files[name])
  if ended:
    raise UsageError(f'{path} cannot be read: the package {package} {ended} on it. The file is '
                     'damaged, or made to do so; take the tokenizer from its source again.')
  # A cache directory may not be writable.
  with contextlib.suppress(OSError), writing.replacing(passed):
    pass


def _run(package: str, raw: bytes) -> str:
  """How the parser fails on a file, in words; '' if it survives."""
  try:
    # -P: imports nothing from the current directory, which may be the tokenizer's.
    done = subprocess.run([sys.executable, '-P', '-c', _CHILD, package, str(_BYTES)], input=raw,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_SECONDS,
                          check=False, env={**os.environ, 'OMP_NUM_THREADS': '1',
                                            'OPENBLAS_NUM_THREADS': '1', 'RAYON_NUM_THREADS': '1'})
  except subprocess.TimeoutExpired:
    return f'takes more than {_SECONDS} s'
  if done.returncode < 0:
    return f'ends the process ({signal.Signals(-done.returncode).name})'
  if done.returncode:
    last = done.stderr.decode('utf-8', 'replace').strip().splitlines()[-1:] or ['']
    return f'fails ({last[0][:200]})'
  return ''


def _folder() -> str:
  """The folder of the hashes of files that passed; one empty file for each."""
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
  return os.path.join(os.path.expanduser(caches), 'btx_jax', 'tokenizers-that-parse')
