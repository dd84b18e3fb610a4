"""What a person sees on the terminal: lines, tables, and a bar for each run."""

from collections.abc import Mapping
import sys
import time

from rich import progress as rich_progress
from rich.console import Console

_PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal

console = Console(highlight=False, markup=False, emoji=False)


class Progress:
  """A bar for each run (loss, tokens/s, time left); plain lines when not on a terminal."""

  def __init__(self, runs: Mapping[str, tuple[int, int]]):
    """`runs` are the steps done, and of all, by name."""
    self._runs = runs
    self._began = time.monotonic()
    self._said = dict.fromkeys(runs, self._began)
    self._bars = None
    if console.is_terminal:
      self._bars = rich_progress.Progress(
          rich_progress.TextColumn('{task.description}', markup=False), rich_progress.BarColumn(),
          rich_progress.MofNCompleteColumn(), rich_progress.TextColumn('{task.fields[text]}'),
          rich_progress.TimeRemainingColumn(), console=console)

  def __enter__(self):
    self._tasks = {}
    if self._bars:
      self._bars.start()
    for name, (start, steps) in self._runs.items():
      if self._bars:
        self._tasks[name] = self._bars.add_task(
            name, total=steps, completed=start, text='compiling')
      else:
        console.print(f'{name}: {start} of {steps} steps, compiling')
    return self

  def __exit__(self, *_):
    if self._bars:
      self._bars.stop()

  def update(self, name: str, step: int, loss: float, tokens_per_second: float | None):
    speed = f'  {tokens_per_second:,.0f} tokens/s' if tokens_per_second else ''
    text = f'loss {loss:.3f}{speed}'
    if self._bars:
      self._bars.update(self._tasks[name], completed=step, text=text)
      return
    now, (start, steps) = time.monotonic(), self._runs[name]
    if now - self._said[name] >= _PLAIN_EVERY or step == steps:
      self._said[name] = now
      left = (now - self._began) / (step - start) * (steps - step)
      console.print(f'{name}: {step} of {steps}  {text}  {left:.0f} s left')


def say(text: str):
  """One line for the person who watches."""
  console.print(text, soft_wrap=True)
  sys.stdout.flush()


def show(table):
  """A rich table. Where the terminal is narrower its lines wrap, but no figure is cut."""
  Console(width=max(console.width, 160), quiet=console.quiet).print(table)
