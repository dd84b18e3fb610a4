"""The command `evaluate`: scores text after the fact, with a run of a study or a pretrained model.

The text need not be in the config. Nothing is written, so runs and their scores do not change. The
text is read, tokenized and scored by the same code as the held-out text of a study.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from btx_jax import terminal
from btx_jax.commands import models
from btx_jax.data import duplicates, folders, text, tokens
from btx_jax.data.domains import TEXT, Domain
from btx_jax.data.text import Text
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.errors import UsageError
from btx_jax.run import Run, lineage
from btx_jax.scoring import bits, error_bars, selected, units
from btx_jax.study import params
from btx_jax.study.study import Study, check_stride
from btx_jax.terminal import format_number, say
from btx_jax.training import layout

_NAME = '--on'  # the name of the domain that each text is read into


class Asked(NamedTuple):
  """The text to score, and how to score it.

  Attributes:
    paths: directories, globs or files, each scored separately.
    text_field, separator: as in base.domain.
    length: tokens per window; 0 means data.seq_len of the config, or without a config the model's
      context length, up to models.LONGEST.
    stride: tokens from the start of one window to the next; None means evaluation.stride.
    format: as in base.domain.
  """
  paths: Sequence[str]
  text_field: str = 'text'
  separator: str = ''
  length: int = 0
  stride: int | None = None
  format: str = TEXT


def print_scores(study: Study | None, run_name: str, folder: str, asked: Asked, as_json: bool
                 ) -> None:
  """Scores texts and prints the scores.

  Args:
    study: the study of the run. The texts are compared with its training text. None if there is no
      config; then `folder` is given.
    run_name: the run that scores the texts; '' if a folder does.
    folder: a pretrained model in Hugging Face's format; '' if a run scores the texts.
    asked: the texts.
    as_json: whether to print JSON; everything else then goes to stderr.

  Raises:
    UsageError: there is no such run or folder, it is not complete, or a text cannot be read.
  """
  terminal.console.stderr = as_json
  scored_by, run = models.opened(study, run_name, folder, asked.length)
  found = evaluate(scored_by, run, asked, study)
  found['model'] = run_name or folder
  if as_json:
    print(json.dumps(found, indent=1))
    return
  terminal.show(as_table(found))
  for path, score in found['texts'].items():
    for line in in_words(score):
      say(f'{path}: {line}')


def evaluate(study: Study, run: Run, asked: Asked, compared: Study | None) -> dict[str, Any]:
  """Scores texts with a run.

  Args:
    study: the study of the run.
    run: the run. It need not be trained, but all runs that its parameters are read from must be
      complete.
    asked: the texts.
    compared: the study whose training text the texts are compared with; None if there is none. If
      it is `study`, only text that the run or its ancestors were trained on is compared.

  Returns:
    `model`; `length` and `stride` of the windows; and `texts`: path -> what units.score returns,
    with the number of units in place of their scores; `error`, the standard error of bits per byte;
    `perplexity`, see units.perplexities; and `trained_on`, see `seen_in_training`.
  """
  for path in asked.paths:
    if not folders.find(path).files:
      raise UsageError(f'--on={path} matches no file (looked from {os.getcwd()}).')
  length = asked.length or study.config.data.seq_len
  if run.selector and length != run.seq_len:
    raise UsageError(f'--length={length}: {run.name!r} is an ensemble, which is measured in '
                     f'windows of data.seq_len = {run.seq_len}; omit --length.')
  settings = study.config.evaluation
  if asked.stride is not None:
    settings.stride = asked.stride
  check_stride(settings.stride, length)
  models.check_readable(study, run, 'evaluate')
  mesh = layout.mesh_here(study.config, study.runs)
  settings.batch_size = layout.evaluation_rows(study.config, mesh)
  known = text.prepare(compared.config, compared.data_folder) if compared else None
  tokenizer = (known.tokenizer if known and compared is study else
               text.tokenizer(study.config, study.data_folder))
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    found = _read(asked, tokenizer, study.config.data.max_skipped, os.path.join(folder, 'scored'))
    if run.selector:
      scores = selected.evaluate(
          study, run, Text(tokenizer, known.train if known else {}, found), mesh)
    else:
      scores = bits.evaluate(run.model, params.final(study, run, mesh), found, mesh, length,
                             settings.batch_size, tokenizer, settings.stride)
    of_run = {domain for each in lineage(run) for domain in each.domains}
    train = {domain: tokens_of for domain, tokens_of in (known.train if known else {}).items()
             if domain in of_run or compared is not study}
    seen = {}
    if known and train:
      if known.tokenizer.hash != tokenizer.hash:  # copies are recognised by their tokens
        found = _read(asked, known.tokenizer, study.config.data.max_skipped,
                      os.path.join(folder, 'compared'))
      seen = seen_in_training(found, train)
  return {'model': run.name, 'length': length, 'stride': settings.stride,
          'texts': {path: _figures(score) | {'trained_on': seen.get(path)}
                    for path, score in scores.items()}}


def seen_in_training(found: Mapping[str, Tokens], train: Mapping[str, Tokens]
                     ) -> dict[str, dict[str, Any]]:
  """How much of each text also occurs in training text.

  Args:
    found: the texts, by path.
    train: the training text by domain.

  Returns:
    path -> `documents`, the number of documents in the training text of any domain; `by_domain`,
    that number for each domain that has some; and `share`, the share of the tokens that lie in
    runs of duplicates.RUN or more tokens that are also in training text.
  """
  overlaps = duplicates.overlaps(found, train)
  hashes = {path: tokens_of.document_hashes for path, tokens_of in found.items()}
  in_any = {path: np.zeros(len(of_path), bool) for path, of_path in hashes.items()}
  by_domain: dict[str, dict[str, int]] = {path: {} for path in found}
  for domain, tokens_of in train.items():
    trained = tokens_of.document_hashes
    for path, of_path in hashes.items():
      there = np.isin(of_path, trained)
      in_any[path] |= there
      if there.any():
        by_domain[path][domain] = int(there.sum())
  return {path: {'documents': int(in_any[path].sum()), 'by_domain': by_domain[path],
                 'share': overlaps[path].share} for path in found}


def as_table(found: Mapping[str, Any]) -> terminal.Table:
  """A table of the scores, with a row for each text."""
  rows = []
  for path, score in found['texts'].items():
    perplexity = score['perplexity']
    rows.append([path, f'{score["bits_per_byte"]:.3f}', format_number(score['error'], '.3f'),
                 *(format_number(perplexity[kind], ',.2f') for kind in ('word', 'token')),
                 *(f'{score[kind]:,}' for kind in ('documents', 'bytes', 'tokens'))])
  moved = f', one every {found["stride"]:,}' if found['stride'] else ''
  return terminal.Table(
      ['text', 'bits per byte', 'error', 'perplexity of words', 'perplexity of tokens', 'documents',
       'bytes', 'tokens'], rows,
      title=f'{found["model"]}, in windows of {found["length"]:,} tokens{moved}',
      caption='error: the standard error of bits per byte from the text, by a jackknife over '
              'documents or blocks of long ones.')


def in_words(score: Mapping[str, Any]) -> list[str]:
  """Lines that a reader needs in order to judge a score."""
  lines = []
  if score['units'] < error_bars.LEAST_UNITS:
    lines.append(f'too little text to estimate the error of the score: {score["units"]} units, and '
                 f'{error_bars.LEAST_UNITS} are needed')
  seen = score['trained_on']
  if seen:
    where = ', '.join(f'{count:,} in {domain}' for domain, count in seen['by_domain'].items())
    lines.append(f'{seen["documents"]:,} of {score["documents"]:,} documents are in the training '
                 f'text{f" ({where})" if where else ""}, and {seen["share"]:.1%} of the tokens are '
                 f'in runs of {duplicates.RUN} or more that are there too')
  return lines


def _figures(score: Mapping[str, Any]) -> dict[str, Any]:
  """A score with its error and perplexities, but without the scores of units."""
  figures = {key: score[key] for key in ('bits_per_byte', 'documents', 'bytes', 'tokens', 'words')}
  return figures | {'units': len(score['units']['bytes']),
                    'error': error_bars.error_of(score['units']),
                    'perplexity': units.perplexities(score)}


def _read(asked: Asked, tokenizer: Tokenizer, max_skipped: float, folder: str
          ) -> dict[str, Tokens]:
  """Tokenizes each text into `folder`; returns the tokens by path."""
  result = {}
  for number, path in enumerate(dict.fromkeys(asked.paths)):
    domain = Domain(_NAME, text_field=asked.text_field, separator=asked.separator,
                    held_out=(path,), format=asked.format)
    place = os.path.join(folder, str(number))
    with _in_flags(path):
      meta = tokens.prepare(place, domain, tokenizer, 0.0, max_skipped)
    for line in text.remarks(meta):
      say(f'{path}: {line}')
    result[path] = tokens.load(place, 'held_out')
  return result


@contextlib.contextmanager
def _in_flags(path: str) -> Iterator[None]:
  """Replaces the fields of the domain in error messages by the flags that they come from."""
  try:
    yield
  except UsageError as error:
    message = str(error).replace(f'domains.{_NAME}.held_out', '--on')
    for field in ('text_field', 'separator'):
      message = message.replace(f'domains.{_NAME}.{field}', f'--{field}')
    raise UsageError(message.replace(f'domains.{_NAME}', f'--on={path}')) from error
