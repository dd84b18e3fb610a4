"""What a person sees on the terminal: lines, tables, and a bar for each run."""

import sys
import time

from rich import progress as rich_progress
from rich.console import Console

_PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal

console = Console(highlight=False, markup=False, emoji=False)


class Progress:
  """A bar for one run (loss, tokens/s, time left); plain lines when not on a terminal."""

  def __init__(self, name: str, steps: int, start: int = 0):
    self._name, self._steps, self._start = name, steps, start
    self._began = self._said = time.monotonic()
    self._bar = None
    if console.is_terminal:
      self._bar = rich_progress.Progress(
          rich_progress.TextColumn('{task.description}', markup=False), rich_progress.BarColumn(),
          rich_progress.MofNCompleteColumn(), rich_progress.TextColumn('{task.fields[text]}'),
          rich_progress.TimeRemainingColumn(), console=console)

  def __enter__(self):
    if self._bar:
      self._bar.start()
      self._task = self._bar.add_task(self._name, total=self._steps, completed=self._start,
                                      text='compiling')
    else:
      console.print(f'{self._name}: {self._start} of {self._steps} steps, compiling')
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()

  def update(self, step: int, loss: float, tokens_per_second: float | None):
    speed = f'  {tokens_per_second:,.0f} tokens/s' if tokens_per_second else ''
    text = f'loss {loss:.3f}{speed}'
    if self._bar:
      self._bar.update(self._task, completed=step, text=text)
      return
    now = time.monotonic()
    if now - self._said >= _PLAIN_EVERY or step == self._steps:
      self._said = now
      left = (now - self._began) / (step - self._start) * (self._steps - step)
      console.print(f'{self._name}: {step} of {self._steps}  {text}  {left:.0f} s left')


def say(text: str):
  """One line for the person who watches."""
  console.print(text, soft_wrap=True)
  sys.stdout.flush()


def show(table):
  """A rich table. Where the terminal is narrower its lines wrap, but no figure is cut."""
  Console(width=max(console.width, 160), quiet=console.quiet).print(table)
