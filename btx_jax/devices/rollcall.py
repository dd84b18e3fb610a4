"""The processes of a job, the secret that they share, and the facts that they must agree on.

They meet before jax starts, see meeting.py.
"""

from collections.abc import Mapping
import ipaddress
import json
from typing import Any, NamedTuple

from btx_jax import errors
from btx_jax.errors import UsageError

TOKEN = 'BTX_JAX_TOKEN'  # environment variable; a flag would show the token to `ps`
BIND = 'JAX_COORDINATOR_BIND_ADDRESS'  # environment variable, of jax
DOCS = 'See docs/processes.md.'
_SHORTEST = 16  # characters of a token: with a recorded proof, shorter ones can be guessed offline


class Place(NamedTuple):
  """The place of a process in its job.

  Attributes:
    coordinator: HOST:PORT of process 0.
    count: number of processes in the job.
    index: of this process, from 0.
    bind: HOST:PORT on which process 0 listens, if that is not `coordinator`.
  """
  coordinator: str
  count: int
  index: int
  bind: str = ''


def place_from_flags(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
  """The place that three flags describe; None if none of them is set.

  Raises:
    UsageError: only some of them are set, or a value is invalid.
  """
  given = {'--coordinator': coordinator, '--num_processes': count, '--process_id': index}
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if coordinator is None or count is None or index is None:
    raise UsageError(
        f'{" and ".join(missing)} {"is" if len(missing) == 1 else "are"} missing: '
        '--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together. '
        'For a single process, omit all three.')
  if not _is_address(coordinator):
    raise UsageError(f'--coordinator={coordinator} must be HOST:PORT, the host of process 0 and '
                     'a free port there, as in node7:6421.')
  if count < 1:
    raise UsageError(f'--num_processes={count} must be at least 1.')
  if not 0 <= index < count:
    raise UsageError(f'--process_id={index} must be from 0 to {count - 1}, as --num_processes='
                     f'{count}.')
  return Place(coordinator, count, index)


def bind(place: Place, address: str | None) -> Place:
  """The place with an address to listen to, if one is set; raises UsageError if it is invalid."""
  if address and not _is_address(address):
    raise UsageError(f'{BIND}={address} must be ADDRESS:PORT, an address of the host of process 0, '
                     'as in 10.0.0.7:6421.')
  return place._replace(bind=address or '')


def _is_address(text: str) -> bool:
  host, _, port = text.rpartition(':')
  return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def split_address(address: str) -> tuple[str, int]:
  """'[::1]:80' -> ('::1', 80)."""
  host, _, port = address.rpartition(':')
  return host.strip('[]'), int(port)


def is_loopback(host: str) -> bool:
  """Whether a host, as written, can only be reached from its own machine; no name is resolved."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


def secret(place: Place, token: str | None) -> bytes:
  """The key by which the processes of a job authenticate each other.

  Args:
    place: of this process.
    token: the value of BTX_JAX_TOKEN; may be missing if all processes are on one machine.

  Raises:
    UsageError: it is missing or too short.
  """
  if not token:
    address = place.bind or place.coordinator
    if all(is_loopback(split_address(each)[0]) for each in (place.coordinator, address)):
      return b''
    raise UsageError(
        f'--coordinator={place.coordinator} can be reached from other machines, and {TOKEN} is '
        'not set. Set it to the same secret on all processes, so that nobody else can take part: '
        f'export {TOKEN}=..., with what `openssl rand -hex 16` prints once. {DOCS}')
  if len(token) < _SHORTEST:
    raise UsageError(f'{TOKEN} has {len(token)} characters, and needs at least {_SHORTEST} that '
                     f'nobody can guess, as `openssl rand -hex 16` prints them. {DOCS}')
  return token.encode(errors='surrogateescape')


def disagreement(facts_of: Mapping[int, Any]) -> str | None:
  """A message with every entry that differs between processes (by index); None if none does."""
  first = min(facts_of)
  others: dict[str, dict[str, list[int]]] = {}  # path -> value -> the processes that have it
  of_first: dict[str, str] = {}
  for index in sorted(facts_of):
    for path, one, other in errors.nested_differences(facts_of[first], facts_of[index]):
      of_first[path] = json.dumps(one)
      others.setdefault(path, {}).setdefault(json.dumps(other), []).append(index)
  if not others:
    return None
  lines = [f'  {path}: {processes([first])} has {of_first[path]}, ' + ', '.join(
      f'{processes(indices)} {"has" if len(indices) == 1 else "have"} {value}'
      for value, indices in values.items()) for path, values in others.items()]
  return ('The processes do not agree, so none has started:\n' + '\n'.join(lines) +
          '\nStart all of them from the same files, with the same command except for '
          f'--process_id. {DOCS}')


def processes(indices: list[int]) -> str:
  """'process 2', or 'processes 1, 3'."""
  if len(indices) == 1:
    return f'process {indices[0]}'
  shown = indices if len(indices) < 10 else [*indices[:8], '...', indices[-1]]
  return f'processes {", ".join(map(str, shown))}'
