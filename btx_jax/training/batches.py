"""The batches of a run: their shapes on the mesh, and reading ahead of the steps."""

from collections.abc import Iterator

import grain
import jax
from jax.sharding import NamedSharding
import numpy as np

from btx_jax.data import mixture
from btx_jax.devices import sharding
from btx_jax.run import Run


def shapes_of(run: Run, mesh, slots: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
  """A global batch as shapes over the mesh; `slots` if it is one of stacked branches."""
  rows = ((slots,) if slots else ()) + (run.microbatches, run.batch_size // run.microbatches)
  over = sharding.batch_sharding(mesh, leading=1, stacked=bool(slots))
  shapes = shapes_of_rows(rows, run.seq_len, over)
  if run.objective.has_reference:
    shapes['reference'] = jax.ShapeDtypeStruct((*rows, run.seq_len), np.float32, sharding=over)
  return shapes


def shapes_of_rows(rows: tuple[int, ...], length: int, over: NamedSharding
                 ) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch as shapes [*rows, length]; of `domain`, [*rows]. `over` is its sharding."""
  ids = ('tokens', 'targets', 'segment_ids', 'positions')
  kinds = dict.fromkeys(ids, np.int32) | {'loss_mask': np.bool_}
  shapes = {name: jax.ShapeDtypeStruct((*rows, length), dtype, sharding=over)
            for name, dtype in kinds.items()}
  return shapes | {'domain': jax.ShapeDtypeStruct(rows, np.int32, sharding=over)}


def read_ahead(batches: grain.MapDataset, first_step: int, last_step: int
               ) -> Iterator[mixture.Batch]:
  """Yields the batches of these steps, counted from 1; a thread reads four ahead."""
  return iter(batches[first_step - 1:last_step].to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
