"""Branch-Train-Merge: averages the predictions of unmixed experts (paper 4.1.1, "BTM").

This is the baseline without mixing or finetuning. The experts' next-token probabilities are
averaged, weighted by how well each expert suits the text so far. The weights for a token depend
only on the tokens before it. One expert is in memory at a time.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
import math
import re
from typing import Any

import numpy as np

from btx_jax.data import mixture
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.evaluate import units
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.study.study import MERGES
from btx_jax.training.loss import next_token_loss

POSTERIOR = 'posterior'
BLOCK = 64  # tokens between comparisons of the text so far
TEMPERATURE = 0.1  # c-BTM's (Gururangan et al. 2023), of squared distances


@functools.cache
def _token_nll(cfg: Config, mesh):
  """Compiles (params, batch [B, T]) -> negative log likelihood of each target, [B, T] in nats."""
  def score(params, batch):
    hidden_BTD, _ = llama.Llama(cfg).apply(
        {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'])
    return next_token_loss(hidden_BTD, llama.output_head(params, hidden_BTD.dtype),
                           batch['targets'], batch['loss_mask'])[1]

  return sharding.jit_replicated(score, mesh)


def token_nll(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int
              ) -> np.ndarray:
  """Negative log likelihood of each token of a split, [tokens] in nats; 0 for the first of each
  document, and for end marks."""
  parts = []
  for batch in mixture.evaluation_batches(tokens, length, batch_size):
    batch = sharding.from_whole(batch, mesh)
    parts.append(np.asarray(_token_nll(cfg, mesh)(params, batch), np.float64).reshape(-1))
  return np.concatenate([[0.0], *parts])[:len(tokens.ids)]


class Similarity:
  """Similarity of texts to each expert's training text: the cosine of tf-idf vectors.

  As in c-BTM, English stop words are left out and all digits count as the same. Unlike there, the
  dimension of the vectors is not reduced, and the experts' own training text is compared, not
  clusters of a corpus.
  """

  def __init__(self, texts: Sequence[Sequence[str]]):
    """`texts`: for each expert, the same number of samples of its training text."""
    self._vectors = tfidf_vectorizer()(
        preprocessor=lambda text: re.sub(r'\d', '0', text.lower()), stop_words='english',
        token_pattern=r'\w+|[^\w\s]', max_features=50_000, dtype=np.float32)
    self._vectors.fit([text for samples in texts for text in samples])
    means = np.concatenate([np.asarray(self._vectors.transform(samples).mean(0))
                            for samples in texts])
    self._means_EX = means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-9)

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Cosine similarities [texts, E]; a text without words gets 0."""
    return np.asarray(self._vectors.transform(texts) @ self._means_EX.T, np.float64)


def tfidf_vectorizer() -> type[Any]:
  """The class of scikit-learn. Raises UsageError if it is not installed."""
  try:
    from sklearn.feature_extraction.text import TfidfVectorizer
  except ImportError as error:
    raise UsageError("evaluation.merge needs scikit-learn: pip install 'btx_jax[merge]', or set "
                     f"it to () or ('{POSTERIOR}',).") from error
  return TfidfVectorizer


def similarity_weights(cosines_E: np.ndarray, k: int) -> np.ndarray:
  """Weights of the k most similar experts (all if k is 0): a softmax of squared distances."""
  logits = 2 * cosines_E / TEMPERATURE  # |a - b|^2 = 2 - 2 cos
  if k and k < len(logits):
    logits = np.where(logits >= np.sort(logits)[-k], logits, -np.inf)
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def block_similarities(similarity: Callable[[Sequence[str]], np.ndarray], tokens: Tokens,
                       tokenizer: Tokenizer) -> list[tuple[slice, np.ndarray]]:
  """Each block's token slice, and the similarity of the text before it to each expert's [E].

  The first block of a document is left out, because no text precedes it.
  """
  result = []
  for first, end in itertools.pairwise(tokens.starts):
    begins = range(first + BLOCK, end, BLOCK)
    if begins:
      before = [tokenizer.decode(tokens.ids[first:begin].tolist()) for begin in begins]
      result += [(slice(begin, min(begin + BLOCK, end)), cosines)
                 for begin, cosines in zip(begins, similarity(before))]
  return result


def similarity_log_weights(blocks: Sequence[tuple[slice, np.ndarray]], k: int, shape
                           ) -> np.ndarray:
  """Log weights of `shape` [tokens, E] from `block_similarities`; uniform outside these blocks."""
  result = np.full(shape, -math.log(shape[1]))
  for block, cosines in blocks:
    with np.errstate(divide='ignore'):
      result[block] = np.log(similarity_weights(cosines, k))
  return result


def posterior_log_weights(nll_NE: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """Log posterior [tokens, E] of each expert, given the likelihoods of the tokens before."""
  result = np.empty_like(nll_NE)
  for first, end in itertools.pairwise(starts):
    before = np.cumsum(nll_NE[first:end], 0) - nll_NE[first:end]
    result[first:end] = -before - _logsumexp(-before)
  return result


def averaged_nll(nll_NE: np.ndarray, log_weights_NE: np.ndarray) -> np.ndarray:
  """Negative log likelihood [tokens] of the weighted mean of the experts' probabilities."""
  return -_logsumexp(log_weights_NE - nll_NE)[:, 0]


def counted(tokens: Tokens) -> np.ndarray:
  """Which tokens of a split have a score, [tokens]: all but the first of each document, and end
  marks."""
  result = np.ones(len(tokens.ids), bool)
  result[tokens.starts[:-1]] = False
  if tokens.ends:
    result[tokens.starts[1:] - 1] = False
  return result


def bits_per_byte(nll_NE: np.ndarray, log_weights_NE: np.ndarray, tokens: Tokens,
                  tokenizer: Tokenizer) -> dict:
  """The score of the averaged probabilities, see units.score."""
  nll_N = np.where(counted(tokens), averaged_nll(nll_NE, log_weights_NE), 0.0)
  return units.score(nll_N, tokens, tokenizer)


def evaluate(forms: Sequence[str], nll: Mapping[str, np.ndarray],
             held_out: Mapping[str, Tokens],
             similarity: Callable[[Sequence[str]], np.ndarray] | None,
             tokenizer: Tokenizer) -> dict[str, dict[str, dict]]:
  """Scores of the merged experts, form -> domain -> score.

  Args:
    forms: keys of study.MERGES.
    nll: domain -> each expert's negative log likelihood of each token, [tokens, E] in nats.
    held_out: domain -> documents.
    similarity: a Similarity to the experts' texts; None is enough for 'posterior'.
    tokenizer: the tokenizer of the tokens.
  """
  result = {form: {} for form in forms}
  for domain, tokens in held_out.items():
    blocks = block_similarities(similarity, tokens, tokenizer) if similarity else []
    for form in forms:
      if form == POSTERIOR:
        weights = posterior_log_weights(nll[domain], tokens.starts)
      else:
        weights = similarity_log_weights(blocks, MERGES[form], nll[domain].shape)
      result[form][domain] = bits_per_byte(nll[domain], weights, tokens, tokenizer)
  return result


def nearest_expert_shares(similarity: Similarity, tokens: Tokens, tokenizer: Tokenizer
                          ) -> np.ndarray:
  """For each expert, the share of whole documents that are most similar to its text, [E]."""
  texts = [tokenizer.decode(tokens.ids[first:end].tolist())
           for first, end in itertools.pairwise(tokens.starts)]
  cosines = similarity(texts)
  return np.bincount(cosines.argmax(1), minlength=cosines.shape[1]) / len(texts)


def _logsumexp(x_NE: np.ndarray) -> np.ndarray:
  most = x_NE.max(1, keepdims=True)
  return most + np.log(np.exp(x_NE - most).sum(1, keepdims=True))
