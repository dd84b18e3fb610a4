"""Our models behind lm-evaluation-harness's interface; needs the extra `eval`, but not torch.

Prompts are tokenized, truncated and cut into windows as in the harness's own `hf` model, so scores
equal those of the same model under transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from btx_jax.data import fast_tokenizer, framing
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError
from btx_jax.generation.generate import Generator
from btx_jax.generation.settings import Sampling
from btx_jax.model.config import Config
from btx_jax.scoring import continuations

MOST_NEW_TOKENS = 256  # in a generated answer, if its task sets no limit
# The generation settings of a task that Sampling supports, by their names in transformers.
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
# Called with a kind of request, the number of requests that are done, and the number of all.
OnProgress = Callable[[str, int, int], None]


class Model(TemplateLM):
  """A model for the harness. With several processes, each acts as rank 0 of 1, on all requests."""

  def __init__(self, config: Config, params, tokenizer: Tokenizer, context: int,
               stop_ids: Sequence[int] = (), batch_size: int = 32, seed: int = 0,
               on_progress: OnProgress | None = None):
    """
    Args:
      config: the model's sizes.
      params: its parameters, laid out as in model/llama.py.
      tokenizer: its tokenizer.
      context: the most tokens that the model reads.
      stop_ids: ids that end a generated text, in addition to the tokenizer's own.
      batch_size: rows per batch.
      seed: the random seed of sampled texts.
      on_progress: called after each batch.
    """
    super().__init__()
    self._config, self._params, self._context = config, params, context
    self._encoder, self._batch_size, self._seed = _with_special_tokens(tokenizer), batch_size, seed
    self._stop_ids = tuple(stop_ids)
    self._writer, self._generator = tokenizer, None
    self._on_progress = on_progress
    begin = tokenizer.framing.begin
    self._begin = [begin.id] if begin else []
    # The token before a text without context: bos, or else eos, as in the `hf` model.
    first, end = (tokenizer.bos_id, tokenizer.eos_id), tokenizer.framing.end
    self._prefix = next((i for i in (*first, end and end.id) if i is not None), None)

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    return self.prefix_token_id if self._writer.eos_id is None else self._writer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """The token before a text without context."""
    if self._prefix is None:
      raise UsageError('The task scores text without context, and the tokenizer has neither a bos '
                       'nor an eos token to put before it; set tokenizer.bos.')
    return self._prefix

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """The ids of a text, after the tokenizer's begin mark unless the text has its own."""
    del kwargs
    begin = self._begin
    if add_special_tokens is False or (begin and has_bos_prefix(string, self._name_of_prefix())):
      begin = []
    return begin + self._encoder.encode([string])[0]

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True
                    ) -> list[tuple[float, bool]]:
    """The log-probability of each continuation after its context, and whether it is greedy."""
    return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True
                            ) -> list[float]:
    """The log-probability of whole texts, in windows as long as the model's context."""
    del disable_tqdm
    windows, text_of = [], []
    for number, request in enumerate(requests):
      found = utils.get_rolling_token_windows(
          self.tok_encode(request.args[0]), self.prefix_token_id, self._context, context_len=1)
      windows += [(None, *utils.make_disjoint_window(window)) for window in found]
      text_of += [number] * (len(windows) - len(text_of))
    result = [0.0] * len(requests)
    for number, (total, _) in zip(text_of, self._loglikelihood_tokens(windows)):
      result[number] += total
    return result

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, **kwargs
                            ) -> list[tuple[float, bool]]:
    del disable_tqdm, kwargs
    found = continuations.score(
        self._config, self._params, [(before, after) for _, before, after in requests],
        self._context, self._batch_size, self._reported('scored'))
    return [(each.total, each.greedy) for each in found]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    """A text for each prompt, up to the first stop string."""
    del disable_tqdm
    result = [''] * len(requests)
    arguments: list[Any] = [request.args for request in requests]
    groups: dict[str, list[int]] = {}  # requests with the same settings
    for number, (_, settings) in enumerate(arguments):
      groups.setdefault(repr(settings), []).append(number)
    report, done = self._reported('generated'), 0
    for numbers in groups.values():
      settings: Any = normalize_gen_kwargs(arguments[numbers[0]][1], MOST_NEW_TOKENS)
      most, until = settings['max_gen_toks'], [each for each in settings['until'] if each]
      sampling = _sampling(settings)
      if most >= self._context:
        raise UsageError(f'The task generates up to {most} tokens, and the model reads at most '
                         f'{self._context}; leave out the task.')
      prompts = [self.tok_encode(requests[number].args[0])[most - self._context:]
                 for number in numbers]
      write = self._generator = self._generator or Generator(
          self._config, self._params, self._writer, self._stop_ids, self._context,
          self._batch_size)
      order = sorted(range(len(numbers)), key=lambda i: len(prompts[i]))
      for first in range(0, len(order), self._batch_size):
        batch = order[first:first + self._batch_size]
        texts = write([prompts[i] for i in batch], most, sampling, until, self._seed + first)
        for i, [text] in zip(batch, texts):
          result[numbers[i]] = text.text
        done += len(batch)
        if report:
          report(done, len(requests))
    return result

  @property
  def tokenizer_name(self) -> str:
    """Identifies the tokenizer."""
    return self._writer.hash

  def _name_of_prefix(self) -> str:
    return next((name for name, i in self._writer.vocabulary().items() if i == self._prefix), '')

  def _reported(self, what: str) -> continuations.OnProgress | None:
    report = self._on_progress
    return report and (lambda done, of: report(what, done, of))


def _sampling(settings: Mapping[str, Any]) -> Sampling:
  """Converts the generation settings of a task, as normalised by the harness.

  Raises:
    UsageError: the task has a setting that is not implemented here.
  """
  known = {'do_sample', 'until', 'max_gen_toks', *_SAMPLING}
  for name, value in settings.items():
    if name not in known and value not in (None, False, 1):
      raise UsageError(f'The task sets {name} = {value!r} for generation, which is not implemented '
                       f'here; implemented: {", ".join(sorted(known))}.')
  if not settings['do_sample']:
    return Sampling(repetition_penalty=settings.get('repetition_penalty', 1.0))
  return Sampling(**{name: settings[name] for name in _SAMPLING if name in settings})


def _with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
  """A version of the tokenizer that encodes special tokens in prompts as such, if it can.

  Prompts may contain them on purpose, and transformers encodes them in this way.
  """
  if not isinstance(tokenizer, fast_tokenizer.FastTokenizer):
    return tokenizer
  begin, end, _ = tokenizer.framing
  options = framing.Options(begin.name if begin else framing.NONE,
                            end.name if end else framing.NONE, framing.ENCODE)
  return fast_tokenizer.FastTokenizer(tokenizer.files, fast_tokenizer.FILE, options)
