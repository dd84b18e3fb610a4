"""generation_config.json: how a model's text is sampled, and the tokens that end it."""

from collections.abc import Mapping, Sequence
import os
from typing import Any, NamedTuple

from btx_jax.convert.config_json import of_folder, read_json
from btx_jax.files import places

FILE = 'generation_config.json'
# What transformers writes about itself.
_OF_WRITER = ('_from_model_config', 'transformers_version')


class Generation(NamedTuple):
  """What a folder says about generating text.

  Attributes:
    settings: the content of generation_config.json; {} without such a file.
    stop_ids: the tokens that end a text, by that file and by config.json, each once.
  """
  settings: Mapping[str, Any] = {}
  stop_ids: tuple[int, ...] = ()


UNKNOWN = Generation()


def read(folder: str) -> Generation:
  """Reads what a Hugging Face folder says. Raises UsageError if a file there is not JSON."""
  path = os.path.join(folder, FILE)
  settings = read_json(path) if places.exists(path) else {}
  return Generation(settings, _each_once([*_ids(settings), *_ids(of_folder(folder))]))


def combine(found: Sequence[Generation]) -> Generation:
  """The settings of the first, and the stop tokens of all."""
  if not found:
    return UNKNOWN
  return Generation(found[0].settings, _each_once(i for each in found for i in each.stop_ids))


def to_json(found: Generation, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
  """The generation_config.json of an exported model.

  Args:
    found: of the model that it descends from.
    bos_id, eos_id: the special tokens of its text; None without a tokenizer. Whatever ends a
      document in training ends a text too.
  """
  kept = {key: value for key, value in found.settings.items() if key not in _OF_WRITER}
  if not kept:  # transformers may then complete it from config.json
    kept = {'_from_model_config': True}
  return {'bos_token_id': bos_id, **kept, 'eos_token_id': stop_tokens(found, eos_id)}


def stop_tokens(found: Generation, eos_id: int | None) -> int | list[int] | None:
  """`eos_token_id` as config.json and generation_config.json have it."""
  ids = _each_once([*found.stop_ids, *([] if eos_id is None else [eos_id])])
  return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _ids(config: Mapping[str, Any]) -> list[int]:
  found = config.get('eos_token_id')
  found = found if isinstance(found, list) else [found]
  return [i for i in found if type(i) is int and 0 <= i < 2**31]


def _each_once(ids) -> tuple[int, ...]:
  return tuple(dict.fromkeys(ids))
