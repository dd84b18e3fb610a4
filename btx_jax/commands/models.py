"""Opens the model that `evaluate` and `generate` use: a run, or a pretrained model in a folder."""

import os
from typing import Any

from btx_jax import base
from btx_jax.convert import config_json
from btx_jax.data import fast_tokenizer
from btx_jax.errors import UsageError
from btx_jax.files import places
from btx_jax.run import Run
from btx_jax.study import manifest, sources
from btx_jax.study.study import Study

LONGEST = 2048  # most tokens per window without a config, even if the context is longer
_FOLDER = 'model'  # name of the run in a study that is made for a folder


def opened(study: Study | None, run_name: str, folder: str, length: int = 0,
           chat_template: str = '', chats: bool = False) -> tuple[Study, Run]:
  """Opens a model as a run; returns its study and the run.

  Args:
    study: the study of the config; None without a config.
    run_name: the run; '' if the model is in a folder.
    folder: a pretrained model in Hugging Face's format; '' if the model is a run's.
    length: tokens per window without a config; 0 means the model's context length, up to LONGEST.
    chat_template: the name of a chat template for a model in a folder; '' for its tokenizer's own.
    chats: whether its tokenizer must render conversations.

  Raises:
    UsageError: there is no such run or folder.
  """
  found = _of_folder(folder, study, length, chat_template, chats) if folder else study
  assert found is not None
  return found, found.run(run_name or _FOLDER)


def _of_folder(folder: str, study: Study | None, length: int, chat_template: str, chats: bool
               ) -> Study:
  """A study with one run, the pretrained model in a folder.

  Args:
    folder: a model in Hugging Face's format, with its tokenizer.
    study: the study whose config decides how text is measured; None without a config.
    length: tokens per window without a config; 0 means the model's context length, up to LONGEST.
    chat_template, chats: see `opened`.
  """
  if places.is_folder(folder) and manifest.read(folder):
    raise UsageError(f'--model={folder} is the directory of a run. Name the run with '
                     '--config=CONFIG and --run=NAME.')
  if not places.exists(os.path.join(folder, config_json.FILE)):
    raise UsageError(f'--model={folder} is not the folder of a pretrained model: it has no '
                     f'{config_json.FILE}.')
  config: Any = base.get_config()
  fast = os.path.join(folder, fast_tokenizer.FILE)
  # A sentencepiece model, which is preferred otherwise, cannot encode special tokens in text.
  config.tokenizer.path = fast if chats and places.exists(fast) else folder
  config.tokenizer.chat_template = chat_template
  config.runs = {_FOLDER: base.run(base.hugging_face(folder))}
  if study:
    for section in ('data', 'evaluation', 'mesh'):
      config[section] = study.config[section]
  else:
    longest = config_json.context_length(config_json.of_folder(folder))
    config.data.seq_len = length or min(longest, LONGEST)
  return Study(config, workdir='')


def check_readable(study: Study, run: Run, command: str) -> None:
  """Raises UsageError unless a run's parameters can be read and match the study's tokenizer."""
  if run.vocabulary:
    raise UsageError(f'--run={run.name} has a different vocabulary than the tokenizer of this '
                     f'config; {command} with --model={run.folder}, which has its own tokenizer.')
  for source in run.sources if run.selector else (run,):
    sources.check_complete(study, sources.trained(source), f'{command} reads')
