"""A config and its working directory as files tell of them: nothing here computes or needs jax.

So it can be looked at from any machine that sees the directory, while runs are going.
"""

import os

from btx_jax import run as run_lib
from btx_jax.data import corpora, text
from btx_jax.errors import UsageError, nearest
from btx_jax.study import fields, manifest
from btx_jax.study import plan as plan_lib

MISSING = 'missing'
# Forms of Branch-Train-Merge, and of how many experts a token meets the mean; 0 is all.
MERGES = {'top_1': 1, 'top_2': 2, 'all': 0, 'posterior': 0}


class Study:
  """The runs of a config in a working directory. Making one checks the config.

  Attributes:
    config: as btx_jax/base.py makes it.
    workdir: where everything goes.
    runs: by name, in the order in which they can be done.
  """

  def __init__(self, config, workdir: str, at_hand: bool = True):
    """`at_hand`: tokenizer and pretrained models have to be there, else only if they are."""
    self.config, self.workdir = config, workdir
    fields.check(config)
    corpora.from_config(config.domains)
    if not 0 < config.data.held_out < 1:
      raise UsageError(f'data.held_out = {config.data.held_out} must be a share between 0 and 1.')
    if not 0 <= config.data.max_skipped <= 1:
      raise UsageError(f'data.max_skipped = {config.data.max_skipped} must be a share from 0 to 1.')
    for field, value, least in (
        ('log_every', config.log_every, 1), ('checkpoint_every', config.checkpoint_every, 1),
        ('checkpoints_kept', config.checkpoints_kept, 1),
        ('evaluation.every', config.evaluation.every, 0),
        ('evaluation.tokens', config.evaluation.tokens, 1)):
      if value < least:
        raise UsageError(f'{field} = {value} must be at least {least}.')
    if not config.mix.ram_gb > 0:
      raise UsageError(f'mix.ram_gb = {config.mix.ram_gb} must be positive.')
    for form in config.evaluation.merge:
      if form not in MERGES:
        raise UsageError(f'evaluation.merge names {form!r}; {nearest(form, MERGES)}')
    tokenizer = None
    if at_hand or os.path.exists(config.tokenizer.path):
      tokenizer = text.given(config, self.data_folder)
    self.runs = plan_lib.make_plan(
        config, tokenizer.vocab_size if tokenizer else config.tokenizer.vocab_size, tokenizer,
        at_hand)
    mixed = [source for run in self.runs.values() if run.init == run_lib.MIX
             for source in run.sources] if config.evaluation.merge else []
    for source in mixed:
      if source.vocabulary:
        raise UsageError(f'evaluation.merge: {source.name!r} has another vocabulary than the '
                         'tokenizer, so that its probabilities are of other tokens; use ().')
      if not source.steps and set(config.evaluation.merge) - {'posterior'}:
        raise UsageError(f'evaluation.merge: {source.name!r} is not trained here, so there is no '
                         "text of its own to compare with; use ('posterior',).")

  @property
  def data_folder(self) -> str:
    """The directory of the tokenized text."""
    return os.path.join(self.workdir, 'data')

  def folder(self, name: str) -> str:
    """The directory of a run."""
    return os.path.join(self.workdir, name)

  def state(self, name: str) -> str:
    """Of a run: 'missing', or what its manifest says."""
    found = manifest.read(self.folder(name))
    return found['state'] if found else MISSING

  def run(self, name: str) -> run_lib.Run:
    """The run of this name. Raises UsageError if there is none."""
    if name not in self.runs:
      raise UsageError(f'--run={name} is not a run of this config; {nearest(name, self.runs)}')
    return self.runs[name]
