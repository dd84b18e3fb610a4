"""What several tests need: a tiny model, random batches, meshes over some of the devices."""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import math

import jax
from jax.sharding import AxisType
import numpy as np

from btx_jax.devices import sharding
from btx_jax.devices.mesh import AXES
from btx_jax.model import llama, source
from btx_jax.model.config import Config
from btx_jax.study import params

# No other dimension is as long as F or half of it: so it is known in compiled programs.
TINY = Config(vocab_size=48, dim=16, ffn_dim=20, num_layers=2, num_heads=4, num_kv_heads=2)
# One round of dispatch, which compiles faster; moe_test.py has the further rounds.
TINY_MIXTURE = dataclasses.replace(TINY, num_experts=4, dispatch_factor=4.0)

# data, fsdp, expert, tensor
MESHES = [(1, 1, 1, 1), (1, 2, 4, 1), (2, 1, 4, 1), (2, 2, 2, 1), (1, 1, 4, 2), (1, 2, 2, 2)]


@contextlib.contextmanager
def use_mesh(shape):
  """Sets a mesh of this shape over the first devices; None sets none."""
  if shape is None:
    yield None
    return
  devices = np.array(jax.devices()[:math.prod(shape)]).reshape(shape)
  mesh = jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
  with jax.set_mesh(mesh):
    yield mesh


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_sums(cfg: Config, params, batch):
  """Final hidden states, and the RoutingSums of a mixture."""
  hidden, routed = llama.Llama(cfg).apply(
      {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'])
  return hidden, routed and routed.sums


class Arrays(source.Arrays):
  """Parameters in memory as a Source whose shapes and dtypes can be looked at."""

  def __init__(self, params: Mapping):
    super().__init__(params)
    self.dtypes = {path: np.dtype(x.dtype) for path, x in self._arrays.items()}


def normal(shape, seed: int = 0) -> np.ndarray:
  """Standard normal numbers, by NumPy: jax.random would be compiled for every shape."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_params(cfg: Config, seed: int = 0, scale: float = 0.3):
  """Random parameters, larger than at the start of training so that everything matters."""
  rng = np.random.default_rng(seed)

  def make(path, leaf):
    around = 1 if sharding.path_of(path).endswith('scale') else 0
    return jax.numpy.float32(around + scale * rng.normal(size=leaf.shape))

  return jax.tree.map_with_path(
      make, jax.eval_shape(lambda: llama.init(cfg, jax.random.key(0))))


def random_batch(cfg: Config, rows: int = 8, length: int = 15, seed: int = 0,
                 padding: int = 0) -> dict[str, np.ndarray]:
  """A batch of packed documents; the last `padding` positions of each row are padding."""
  rng = np.random.default_rng(seed)
  begins = rng.random((rows, length + 1)) < 0.2
  segments = 1 + np.cumsum(begins, 1)
  at = np.arange(length + 1)
  positions = at - np.maximum.accumulate(at * begins, 1)
  tokens = rng.integers(0, cfg.vocab_size, (rows, length + 1))
  batch = {
      'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': segments[:, :-1],
      'positions': positions[:, :-1], 'loss_mask': segments[:, 1:] == segments[:, :-1]}
  if padding:
    for values in batch.values():
      values[:, length - padding:] = 0
  batch = {k: v.astype(np.bool_ if k == 'loss_mask' else np.int32) for k, v in batch.items()}
  return batch | {'domain': (np.arange(rows) % 2).astype(np.int32)}


def assert_trees_close(actual, expected, rtol: float, atol: float = 1e-7):
  """Each leaf within `rtol` of the other's largest value; the message names the leaf."""
  def check(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f'{sharding.path_of(path)}: {a.shape} and {b.shape}'
    limit = rtol * np.abs(b).max() + atol
    worst = np.abs(a - b).max()
    assert worst <= limit, f'{sharding.path_of(path)}: differs by {worst}, allowed {limit}'

  jax.tree.map_with_path(check, actual, expected)


def assert_trees_equal(actual, expected):
  """Bit for bit."""
  def check(path, a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), sharding.path_of(path))

  jax.tree.map_with_path(check, actual, expected)


def final_params(study, name: str):
  """The parameters that a run of a study at work ended with."""
  return params.final(study, study.runs[name], study.mesh)


def initial_params(study, name: str):
  """The parameters that a run of a study at work starts from."""
  return params.initial(study, study.runs[name], study.mesh)
