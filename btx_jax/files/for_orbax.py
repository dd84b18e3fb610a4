"""Buckets as orbax reads and writes them beside the arrays, which it stores through tensorstore.

orbax lists and removes through etils.epath, and epath through fsspec. This file system of fsspec's
uses the same requests, waiting and errors as the rest of the package (objects.py).
"""

import contextlib
import importlib.util
import io
from typing import Any

import fsspec

from btx_jax.errors import UsageError
from btx_jax.files import objects, places


def prepare(path: str) -> None:
  """Makes orbax ready for a path, if that is in a bucket.

  Raises:
    UsageError: a package is missing.
  """
  if not places.is_in_bucket(path):
    return
  # Orbax asks it whether the bucket has a hierarchical namespace.
  with contextlib.suppress(ModuleNotFoundError):
    if importlib.util.find_spec('google.cloud.storage'):
      fsspec.register_implementation('gcs', _Objects, clobber=True)
      return
  raise UsageError(f'{path}: checkpoints in a bucket need the package google-cloud-storage: '
                   "pip install 'btx_jax[gcs]'")


class _Objects(fsspec.AbstractFileSystem):
  """The objects of all buckets."""
  protocol = ('gs', 'gcs')
  cachable = False

  def info(self, path: str, **_: Any) -> dict[str, Any]:
    path = _key(path)
    if '/' in path and objects.exists(_url(path)):
      return {'name': path, 'size': None, 'type': 'file'}
    self.ls(path)  # raises FileNotFoundError if there is none
    return {'name': path, 'size': 0, 'type': 'directory'}

  def exists(self, path: str, **_: Any) -> bool:
    return self._kind(path) != ''

  def isdir(self, path: str) -> bool:
    return self._kind(path) == 'directory'

  def isfile(self, path: str) -> bool:
    return self._kind(path) == 'file'

  def _kind(self, path: str) -> str:
    """'file', 'directory', or '' if there is nothing.

    Raises OSError if access is refused, where the methods of fsspec would return False.
    """
    try:
      return self.info(path)['type']
    except FileNotFoundError:
      return ''

  def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
    path = _key(path)
    children: dict[str, str] = {}
    for each in objects.below(_url(path)):
      name = each.partition('/')[0]
      children.setdefault(f'{path}/{name}', 'file' if name == each else 'directory')
    if not children:
      raise FileNotFoundError(path)
    return [{'name': name, 'size': None, 'type': kind} if detail else name
            for name, kind in children.items()]

  def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
    pass  # a folder exists once it holds an object

  def makedirs(self, path: str, exist_ok: bool = False) -> None:
    pass

  def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
    url = _url(_key(path))
    objects.remove(url)
    if recursive:
      objects.remove_below(url)

  def _open(self, path: str, mode: str = 'rb', *_: Any, **__: Any) -> io.BytesIO:
    url = _url(_key(path))
    return io.BytesIO(objects.read(url).data) if mode == 'rb' else _New(url)


class _New(io.BytesIO):
  """An object that is written when it is closed."""

  def __init__(self, url: str):
    super().__init__()
    self._url = url

  def close(self) -> None:
    if not self.closed:
      data = self.getvalue()
      super().close()  # first: what cannot be written now must not be written later
      objects.write(self._url, data)


def _key(path: str) -> str:
  return path.removeprefix(places.BUCKET).rstrip('/')


def _url(path: str) -> str:
  return places.BUCKET + path
