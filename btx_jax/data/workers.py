"""Tokenizes batches of documents in processes of their own, in the order of the batches.

Each process runs `serve`, and imports neither jax nor the program that started it. It reads pickled
batches from its standard input and writes their tokens to its standard output. When its input ends,
so does it: no process outlives the one that started it, however that ended.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import os
import pickle
import queue
import subprocess
import sys
from typing import Any

from btx_jax.data import tokenizer as tokenizers
from btx_jax.data.records import Document
from btx_jax.data.token_files import Encoded
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import RunError

# The paths are those of the program, and its own folder is not added to them.
_CHILD = ('import sys; sys.path[:] = sys.argv[1:]; '
          'from btx_jax.data import workers; workers.serve()')
_AHEAD = 2  # batches per process that are read and not yet returned
_MOST = 16  # processes by default: more wait for the one that reads and writes

Encode = Callable[[Sequence[Document], Tokenizer], Iterator[Encoded]]


def default_count() -> int:
  """The number of processes unless the config sets one: the cores that this process may use."""
  return min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else
             os.cpu_count() or 1, _MOST)


def in_order(encode: Encode, tokenizer: Tokenizer, batches: Iterator[Sequence[Document]],
             count: int) -> Iterator[Encoded]:
  """Yields what `encode(batch, tokenizer)` yields for each of the batches.

  Args:
    encode: a function of a module, which the processes import.
    tokenizer: encodes the documents.
    batches: the documents. At most `_AHEAD` batches per process are in memory.
    count: the number of processes.

  Raises:
    RunError: a process ended early.
    Whatever `batches` or `encode` raises, once all documents before that have been yielded.
  """
  waiting, failed, idle = collections.deque(), None, queue.SimpleQueue()
  threads, children = ThreadPoolExecutor(count), []
  try:
    for _ in range(count):
      children.append(_start())
      idle.put((children[-1], [(encode, tokenizer)]))
    more = True
    while True:
      while more and len(waiting) < _AHEAD * count:
        try:
          batch = next(batches, None)
        except Exception as error:  # it is raised where one process would have met it
          batch, failed = None, error
        if more := batch is not None:
          waiting.append((batch, threads.submit(_ask, idle, batch)))
      if not waiting:
        break
      batch, answer = waiting.popleft()
      found = answer.result()
      if found is None:
        yield from encode(batch, tokenizer)  # raises what it raised there
        continue
      for document, (ids, spelled, roles) in zip(batch, found, strict=True):
        yield Encoded(document, ids, document.text.encode('utf-8') if spelled is None else spelled,
                      roles)
    if failed:
      raise failed
  finally:
    for child in children:
      child.kill()
    threads.shutdown(cancel_futures=True)
    for child in children:
      with contextlib.suppress(BrokenPipeError), child:
        pass  # closes its pipes and waits for it


def serve() -> None:
  """The work of a process: answers each batch with its tokens, or with None if encoding failed."""
  tokenizers.Sentencepiece.num_threads = 1
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # so that nothing else is written among the answers
  with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
    encode, tokenizer = pickle.load(sys.stdin.buffer)
    while True:
      batch = pickle.load(sys.stdin.buffer)
      pickle.dump(_answer(encode, tokenizer, batch), answers, pickle.HIGHEST_PROTOCOL)
      answers.flush()
  os._exit(0)  # what is left in the buffer of `answers` has no reader


def _answer(encode: Encode, tokenizer: Tokenizer, batch: Sequence[Document]
            ) -> list[tuple[Any, ...]] | None:
  """The ids of each document, the bytes they spell (None if those of its text) and the roles."""
  try:
    return [(found.ids, None if found.spelled == found.document.text.encode('utf-8') else
             found.spelled, found.roles) for found in encode(batch, tokenizer)]
  except BaseException:  # the tokenizers of Rust raise errors that are no Exception
    return None


def _start() -> subprocess.Popen:
  """Starts a process. Ctrl-C does not reach it: the one that started it ends it."""
  return subprocess.Popen(
      [sys.executable, '-c', _CHILD, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      start_new_session=True, env={**os.environ, 'TOKENIZERS_PARALLELISM': 'false'})


def _ask(idle: queue.SimpleQueue, batch: Sequence[Document]) -> list[tuple[Any, ...]] | None:
  """The answer of a process that is idle; `idle` has each with what it must be told before."""
  child, before = idle.get()
  try:
    for each in (*before, batch):
      pickle.dump(each, child.stdin, pickle.HIGHEST_PROTOCOL)
    child.stdin.flush()
    return pickle.load(child.stdout)
  except (OSError, EOFError, pickle.UnpicklingError) as error:
    raise RunError(
        f'A process that tokenizes ended with exit code {child.wait()} before its work was done; '
        '-9 often means that memory ran out. Run the same command again, with fewer processes '
        '(--config.data.processes=1) if it happens again.') from error
  finally:
    idle.put((child, []))
