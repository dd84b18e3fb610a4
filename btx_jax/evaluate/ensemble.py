"""Branch-Train-Merge: experts that stay as they are and speak together (paper 4.1.1, "BTM").

The other end of the method: nothing is mixed or finetuned. The probabilities that the experts
give to a token are averaged, by weights that tell how well each expert suits the text so far.
Only what stands before a token decides the weights for it. One expert is in memory at a time.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from btx_jax.data import mixture
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.study.study import MERGES
from btx_jax.training.loss import next_token_loss

POSTERIOR = 'posterior'
BLOCK = 64  # tokens after which the text so far is compared anew
TEMPERATURE = 0.1  # c-BTM's (Gururangan et al. 2023), of squared distances


@functools.cache
def _token_nll(cfg: Config, mesh):
  """(params, batch [B, T]) -> negative log likelihood of every target, [B, T] in nats."""
  def step(params, batch):
    hidden_BTD, _ = llama.Llama(cfg).apply(
        {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'])
    one_by_one = lambda x: x.reshape(-1, 1, *x.shape[2:])  # the loss tells sums of rows
    _, nll = next_token_loss(
        one_by_one(hidden_BTD), llama.output_head(params, hidden_BTD.dtype),
        one_by_one(batch['targets']), one_by_one(batch['loss_mask']))
    return nll.reshape(batch['targets'].shape)

  return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def token_nll(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int
              ) -> np.ndarray:
  """What a model gives every token of a split, [tokens] in nats; 0 for a document's first."""
  rows = sharding.local_rows(mesh, batch_size)
  parts = []
  for batch in mixture.evaluation_batches(tokens, length, batch_size):
    batch = sharding.to_global({k: v[rows] for k, v in batch.items()}, mesh, batch_size)
    parts.append(np.asarray(_token_nll(cfg, mesh)(params, batch), np.float64).reshape(-1))
  return np.concatenate([[0.0], *parts])[:len(tokens.ids)]


class Likeness:
  """How like the text of each expert some text is: the cosine of tf-idf vectors.

  As in c-BTM, English stop words are left out and digits are all the same; unlike there, the
  vectors are not reduced, and every expert's text is the one that it was trained on.
  """

  def __init__(self, texts: Sequence[Sequence[str]]):
    """`texts`: pieces of what each expert was trained on, as many of each."""
    self._vectors = vectorizer()(
        preprocessor=lambda text: re.sub(r'\d', '0', text.lower()), stop_words='english',
        token_pattern=r'\w+|[^\w\s]', max_features=50_000, dtype=np.float32)
    self._vectors.fit([text for of_one in texts for text in of_one])
    means = np.concatenate([np.asarray(self._vectors.transform(of_one).mean(0))
                            for of_one in texts])
    self._means_EX = means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-9)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Cosines [texts, E]; 0 for text without words."""
    return np.asarray(self._vectors.transform(texts) @ self._means_EX.T, np.float64)


def vectorizer():
  """scikit-learn's class. Raises UsageError if it is not installed."""
  try:
    from sklearn.feature_extraction.text import TfidfVectorizer
  except ImportError as error:
    raise UsageError("evaluation.merge needs scikit-learn: pip install 'btx_jax[merge]', or "
                     f"leave it () or ('{POSTERIOR}',).") from error
  return TfidfVectorizer


def similar_weights(cosines_E: np.ndarray, k: int) -> np.ndarray:
  """Weights of the k most similar experts (all if 0): a softmax of squared distances."""
  logits = 2 * cosines_E / TEMPERATURE  # |a - b|^2 = 2 - 2 cos
  if k and k < len(logits):
    logits = np.where(logits >= np.sort(logits)[-k], logits, -np.inf)
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def similarities(likeness: Likeness, tokens: Tokens, tokenizer: Tokenizer
                 ) -> list[tuple[slice, np.ndarray]]:
  """The tokens of each block, and how like each expert's text is what its document has before.

  The first block of a document has nothing before it and is left out.
  """
  result = []
  for first, end in itertools.pairwise(tokens.starts):
    begins = range(first + BLOCK, end, BLOCK)
    if begins:
      before = [tokenizer.decode(tokens.ids[first:begin].tolist()) for begin in begins]
      result += [(slice(begin, min(begin + BLOCK, end)), cosines)
                 for begin, cosines in zip(begins, likeness(before))]
  return result


def similar_log_weights(similar: Sequence[tuple[slice, np.ndarray]], k: int, shape) -> np.ndarray:
  """Log weights of `shape` [tokens, E] by `similarities`; elsewhere all experts count the same."""
  result = np.full(shape, -math.log(shape[1]))
  for block, cosines in similar:
    with np.errstate(divide='ignore'):
      result[block] = np.log(similar_weights(cosines, k))
  return result


def posterior_log_weights(nll_NE: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """Log probability [tokens, E] of each expert after what it gave to the text before a token."""
  result = np.empty_like(nll_NE)
  for first, end in itertools.pairwise(starts):
    before = np.cumsum(nll_NE[first:end], 0) - nll_NE[first:end]
    result[first:end] = -before - _logsumexp(-before)
  return result


def together(nll_NE: np.ndarray, log_weights_NE: np.ndarray) -> np.ndarray:
  """Negative log likelihood [tokens] of the weighted mean of the experts' probabilities."""
  return -_logsumexp(log_weights_NE - nll_NE)[:, 0]


def bits_per_byte(nll_NE: np.ndarray, log_weights_NE: np.ndarray, tokens: Tokens, eos: int
                  ) -> dict:
  """The score of the averaged probabilities, as evaluate.bits has it."""
  counted = np.ones(len(tokens.ids), bool)
  counted[tokens.starts[:-1]] = False
  counted &= np.asarray(tokens.ids) != eos
  nll = together(nll_NE, log_weights_NE)[counted].sum()
  size = int(tokens.bytes[-1])
  return {'bits_per_byte': nll / math.log(2) / size, 'tokens': int(counted.sum()), 'bytes': size}


def evaluate(forms: Sequence[str], nll: Mapping[str, np.ndarray],
             held_out: Mapping[str, Tokens], likeness: Likeness | None,
             tokenizer: Tokenizer) -> dict[str, dict[str, dict]]:
  """Scores by form and domain.

  Args:
    forms: of study.MERGES.
    nll: by domain, what each expert gives every token, [tokens, E].
    held_out: by domain.
    likeness: not needed for 'posterior'.
    tokenizer: of the tokens.
  """
  result = {form: {} for form in forms}
  for domain, tokens in held_out.items():
    similar = similarities(likeness, tokens, tokenizer) if likeness else []
    for form in forms:
      if form == POSTERIOR:
        weights = posterior_log_weights(nll[domain], tokens.starts)
      else:
        weights = similar_log_weights(similar, MERGES[form], nll[domain].shape)
      result[form][domain] = bits_per_byte(nll[domain], weights, tokens, tokenizer.eos_id)
  return result


def taken_for(likeness: Likeness, tokens: Tokens, tokenizer: Tokenizer) -> np.ndarray:
  """The share of whole documents that are most like the text of each expert, [E]."""
  texts = [tokenizer.decode(tokens.ids[first:end].tolist())
           for first, end in itertools.pairwise(tokens.starts)]
  cosines = likeness(texts)
  return np.bincount(cosines.argmax(1), minlength=cosines.shape[1]) / len(texts)


def _logsumexp(x_NE: np.ndarray) -> np.ndarray:
  most = x_NE.max(1, keepdims=True)
  return most + np.log(np.exp(x_NE - most).sum(1, keepdims=True))
