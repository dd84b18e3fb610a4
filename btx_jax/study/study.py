"""A config and its working directory, read from files alone: nothing here computes or needs jax.

So any machine that sees the directory can inspect it, also while runs are in progress.
"""

from collections.abc import Mapping
import functools
import os

from btx_jax.data import domains, origin, text, tokens
from btx_jax.errors import UsageError, nearest
from btx_jax.files import naming, places
from btx_jax.run import Run
from btx_jax.study import fields, manifest, plan, recorded, rows

MISSING = 'missing'


class Study:
  """The runs of a config in a working directory. Creating one checks the config.

  Attributes:
    config: as btx_jax/base.py makes it.
    workdir: the directory of all checkpoints, tokens and reports.
    runs: by name; each comes after the runs it starts from.
  """

  def __init__(self, config, workdir: str, at_hand: bool = True):
    """`at_hand`: the tokenizer and pretrained models must exist; if false, they may be missing."""
    fields.check(config)
    self.config = config = fields.with_home(config)
    self.workdir = os.path.expanduser(workdir)
    if workdir:  # otherwise there are no checkpoints
      naming.checkpoint_path(self.workdir)
    domains.from_config(config.domains)
    if not 0 < config.data.held_out < 1:
      raise UsageError(f'data.held_out = {config.data.held_out} must be a share between 0 and 1.')
    if not 0 <= config.data.max_skipped <= 1:
      raise UsageError(f'data.max_skipped = {config.data.max_skipped} must be a share from 0 to 1.')
    for field, value, least in (
        ('log_every', config.log_every, 1), ('checkpoint_every', config.checkpoint_every, 1),
        ('checkpoint_patience', config.checkpoint_patience, 1),
        ('checkpoints_kept', config.checkpoints_kept, 1),
        ('checkpoints_kept_every', config.checkpoints_kept_every, 0),
        ('data.processes', config.data.processes, 0),
        ('evaluation.every', config.evaluation.every, 0),
        ('evaluation.stride', config.evaluation.stride, 0),
        ('evaluation.tokens', config.evaluation.tokens, 1)):
      if value < least:
        raise UsageError(f'{field} = {value} must be at least {least}.')
    check_stride(config.evaluation.stride, config.data.seq_len)
    if not config.mix.ram_gb > 0:
      raise UsageError(f'mix.ram_gb = {config.mix.ram_gb} must be positive.')
    tokenizer = None
    if at_hand or places.exists(config.tokenizer.path):
      tokenizer = text.given(config, self.data_folder)
    self._plan = functools.partial(
        plan.make_plan, config,
        tokenizer.vocab_size if tokenizer else config.tokenizer.vocab_size, tokenizer, at_hand)
    self.runs = self.plan(recorded.best_steps(config, self.recorded, self.folder))
    self._tokenizer = tokenizer

  def plan(self, best: Mapping[str, int]) -> dict[str, Run]:
    """The runs, given the steps that step='best' means; see recorded.best_steps."""
    return recorded.with_first_names(self._plan(best), self.recorded)

  @functools.cached_property
  def text_changes(self) -> list[str]:
    """Lines on how the config or the files differ from what the tokenized text was made from.

    Computed once, as there may be many files.
    """
    return list(origin.in_words(text.changed(self.config, self.data_folder, self._tokenizer)))

  @property
  def data_folder(self) -> str:
    """The directory of the tokenized text."""
    return os.path.join(self.workdir, 'data')

  def text_meta(self, domain: str) -> dict | None:
    """The meta.json of a domain's tokens; None if it is not tokenized, or they are unreadable."""
    try:
      return tokens.read_meta(os.path.join(self.data_folder, domain))
    except UsageError:
      return None

  def folder(self, name: str) -> str:
    """The directory of a run."""
    return os.path.join(self.workdir, name)

  @property
  def series(self) -> list[str]:
    """The series of runs, one for each of config.seeds; [''] without these."""
    return list(dict.fromkeys(run.series for run in self.runs.values() if run.series)) or ['']

  def of_series(self, series: str) -> list[Run]:
    """The runs of a series, and those that all series share."""
    return [run for run in self.runs.values() if run.series in ('', series)]

  def manifest_of(self, name: str) -> dict | None:
    """The manifest of a run; where only its row is here, that in the row. None without either.

    Raises:
      UsageError: the file is damaged.
    """
    found = manifest.read(self.folder(name))
    if found is None and (row := rows.read(self.config.rows, name)):
      return row['manifest'] | {'state': manifest.PUBLISHED}
    return found

  def recorded(self, name: str) -> dict | None:
    """The same; None also if it is unreadable, which is reported elsewhere."""
    try:
      return self.manifest_of(name)
    except (UsageError, NotADirectoryError):
      return None

  def row(self, name: str) -> dict | None:
    """The row that stands for a run, as the working directory does not have it; else None."""
    return None if manifest.read(self.folder(name)) else rows.read(self.config.rows, name)

  def state(self, name: str) -> str:
    """The state of a run, from its manifest; 'missing' if it has none, and no row."""
    found = self.manifest_of(name)
    return found['state'] if found else MISSING

  def run(self, name: str) -> Run:
    """The run of this name. Raises UsageError if the config has none."""
    named = [run.name for run in self.runs.values() if run.plain_name == name]
    if named and name not in self.runs:
      raise UsageError(f'--run={name} is trained once for each of config.seeds; name one of '
                       f'{", ".join(named)}.')
    if name not in self.runs:
      raise UsageError(f'--run={name} is not a run of this config; {nearest(name, self.runs)}')
    return self.runs[name]


def check_stride(stride: int, length: int) -> None:
  """Raises UsageError if windows of `length` tokens leave gaps between them."""
  if stride > length:
    raise UsageError(f'evaluation.stride = {stride} is more than the {length} tokens of a window, '
                     'so tokens between two windows would not be measured.')
