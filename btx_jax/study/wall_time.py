"""How long a form of training takes on several machines, joined by links of a known rate.

A form is a sequence of stages. In a stage either the machines train one model together, or several
models are trained apart, each on machines of its own, and then sent to all. docs/wall_time.md has
the formulas and what they assume. Nothing here reads files or needs jax.

Throughout, `machines` is W, `bandwidth` is in bytes per second that a machine can send, and as many
that it can receive at the same time, and `hidden` is the share of a step's compute during which
gradients can already be sent: 0 if the sum of the gradients waits for the whole backward pass, as
it does in this package, and BACKWARD for a program that hides as much as can be hidden.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

from btx_jax.outer import Outer

BACKWARD = 2 / 3  # of a step's FLOPs
_SLOWEST, _FASTEST = 1.0, 1e15  # bytes per second, between which a break-even link is sought


@dataclasses.dataclass(frozen=True)
class Training:
  """The training of one model.

  Attributes:
    name: of the run.
    steps: how many.
    seconds: of a step on one machine.
    rows: B, rows of a step.
    size: bytes of the parameters that train, and so of their gradient.
    outer: the settings of DiLoCo; None is synchronous data parallelism.
  """
  name: str
  steps: int
  seconds: float
  rows: int
  size: float
  outer: Outer | None = None


@dataclasses.dataclass(frozen=True)
class Branches:
  """Models that are trained apart. Then each machine receives all of them.

  Attributes:
    forms: of each.
    sizes: bytes of each that are sent: of the parameters that it trained.
  """
  forms: tuple['Form', ...]
  sizes: tuple[float, ...]


Form = tuple[Training | Branches, ...]


class Time(NamedTuple):
  """What a form takes. Times of stages that follow each other add up.

  Attributes:
    compute: seconds.
    exposed: seconds in which machines only wait for the link.
    sent: bytes, of the machine that sends most.
  """
  compute: float = 0.0
  exposed: float = 0.0
  sent: float = 0.0

  @property
  def total(self) -> float:
    """Seconds."""
    return self.compute + self.exposed

  def then(self, other: 'Time') -> 'Time':
    """The time of this and then `other`."""
    return Time(*(a + b for a, b in zip(self, other)))


def all_reduce(size: float, machines: int) -> float:
  """Bytes that each machine of a ring sends, and receives, to sum `size` bytes over all."""
  return 2 * (machines - 1) / machines * size


def all_gather(size: float, machines: int) -> float:
  """Bytes that each machine of a ring sends, and receives, until all have `size` bytes in all."""
  return (machines - 1) / machines * size


def time_of(form: Form, machines: int, bandwidth: float, hidden: float = 0.0) -> Time:
  """The time of a form."""
  total = Time()
  for stage in form:
    if isinstance(stage, Training):
      total = total.then(_time_of_training(stage, machines, bandwidth, hidden))
    else:
      total = total.then(_time_of_branches(stage, machines, bandwidth, hidden))
  return total


def _time_of_training(run: Training, machines: int, bandwidth: float, hidden: float) -> Time:
  """The time of one run on all machines, which its workers share evenly.

  If there are fewer machines than workers, each has as many of them as the others.
  """
  outer = run.outer or Outer(workers=1)
  workers = math.gcd(outer.workers, machines)  # as far as the link is concerned
  step = run.seconds * math.ceil(run.rows / machines) / run.rows
  summed = all_reduce(run.size, machines // workers)
  met = outer.meetings(run.steps) * all_reduce(run.size, workers)
  exposed = run.steps * max(summed / bandwidth - hidden * step, 0.0) + met / bandwidth
  return Time(run.steps * step, exposed, run.steps * summed + met)


def _time_of_branches(stage: Branches, machines: int, bandwidth: float, hidden: float) -> Time:
  """The time of the slowest branch, and of sending every model to all machines.

  A branch leaves those of its machines idle that would make it slower.
  """
  def on(branch: Form, count: int) -> Time:
    return min((time_of(branch, n, bandwidth, hidden) for n in range(1, count + 1)),
               key=lambda time: time.total)

  branches = sorted(stage.forms, key=lambda branch: -on(branch, 1).total)
  count = len(branches)
  if machines > count:  # as evenly as can be; the slowest have one more
    each, more = divmod(machines, count)
    groups = [on(branch, each + (i < more)) for i, branch in enumerate(branches)]
  else:  # the longest first, each to the machine that is idle soonest
    groups = [Time()] * machines
    for branch in branches:
      first = min(range(machines), key=lambda i: groups[i].total)
      groups[first] = groups[first].then(on(branch, 1))
  sent = all_gather(sum(stage.sizes), machines)
  slowest = max(groups, key=lambda group: group.total)
  return Time(slowest.compute, slowest.exposed, max(group.sent for group in groups)).then(
      Time(0.0, sent / bandwidth, sent))


def break_even(form: Form, baseline: Form, machines: int, hidden: float = 0.0
               ) -> tuple[float, bool]:
  """The bandwidth at which two forms take equally long.

  Returns:
    The bandwidth, and whether `form` is faster below it (True) or above it (False). Infinity and
    True: it is always faster; infinity and False: it never is.
  """
  def is_faster(bandwidth: float) -> bool:
    ours, theirs = (time_of(each, machines, bandwidth, hidden).total for each in (form, baseline))
    return ours < theirs

  below, above = is_faster(_SLOWEST), is_faster(_FASTEST)
  if below == above:
    return math.inf, below
  low, high = _SLOWEST, _FASTEST
  while high / low > 1 + 1e-9:
    middle = math.sqrt(low * high)
    low, high = (middle, high) if is_faster(middle) == below else (low, middle)
  return low, below


def shared_stages(forms: Sequence[Form]) -> int:
  """The number of stages with which all forms begin alike.

  They are those before anything is trained apart, and of every form at least one stage is not among
  them.
  """
  count = 0
  for stages in zip(*(form[:-1] for form in forms)):
    if len(set(stages)) > 1 or isinstance(stages[0], Branches):
      break
    count += 1
  return count
