"""The context length of a run's model, as export writes it, and rows that are longer."""

import os

from btx_jax.convert import config_json
from btx_jax.run import Run, descent


def length(run: Run) -> int:
  """The longest text that a run's model is for, in tokens: that of the folder it descends from.

  Without one, the rows that it was trained on.
  """
  folder = _folder(run)
  if not folder:
    return run.seq_len
  found = config_json.read_json(os.path.join(folder, config_json.FILE))
  return config_json.context_length(found)


def remark(run: Run) -> str:
  """A line if a run's rows are longer than the text that its model is for; else ''."""
  if run.seq_len <= length(run):
    return ''
  return (f'rows of data.seq_len = {run.seq_len:,} tokens are longer than the {length(run):,} that '
          f'the model in {_folder(run)} is for (max_position_embeddings): later positions are new '
          'to it, and an export keeps its figure. Lower data.seq_len, or change '
          'max_position_embeddings in that folder to train for longer text')


def _folder(run: Run) -> str:
  """The pretrained folder that a run descends from; '' without one."""
  return next((each.folder for each in descent(run) if each.folder), '')
