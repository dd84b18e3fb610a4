"""An ensemble's prediction: the weighted mean of its experts' next-token probabilities.

The weights of Branch-Train-Merge (paper 4.1.1, "BTM") follow from how well each expert suits the
text so far, by tf-idf or by likelihood. The weights for a token depend only on the tokens before
it. selected.py scores whole ensembles.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import re
from typing import Any

import numpy as np

from btx_jax import selector
from btx_jax.data import mixture
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.data.tokens import Tokens
from btx_jax.devices import sharding
from btx_jax.errors import UsageError
from btx_jax.model import llama
from btx_jax.model.config import Config
from btx_jax.scoring import units
from btx_jax.training.loss import next_token_loss


@functools.cache
def _token_nll(cfg: Config, mesh):
  """Compiles (params, batch [B, T]) -> negative log likelihood of each target, [B, T] in nats."""
  def score(params, batch):
    hidden_BTD, _ = llama.Llama(cfg).apply(
        {'params': params}, batch['tokens'], batch['segment_ids'], batch['positions'])
    return next_token_loss(hidden_BTD, llama.output_head(params, hidden_BTD.dtype),
                           batch['targets'], batch['loss_mask'])[1]

  return sharding.jit_replicated(score, mesh)


def token_nll(cfg: Config, params, tokens: Tokens, mesh, length: int, batch_size: int,
              stride: int = 0) -> np.ndarray:
  """Negative log likelihood of each token of a split, [tokens] in nats.

  It is 0 for end marks and the first token of each document. In conversations, tokens that are read
  only have one, too, because experts are weighted by it. `length` and `stride` are those of
  bits.evaluate.
  """
  parts = []
  for batch in mixture.evaluation_batches(tokens, length, batch_size, stride):
    if tokens.roles is not None:
      batch = batch | {'loss_mask': batch['segment_ids'] > 0}
    batch = sharding.from_whole(batch, mesh)
    parts.append(np.asarray(_token_nll(cfg, mesh)(params, batch), np.float64))
  nll_N = mixture.by_token(tokens, np.concatenate(parts), length, stride)
  return np.append(0.0, nll_N)


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
    raise UsageError("base.tfidf needs scikit-learn: pip install 'btx_jax[tfidf]', or use "
                     'base.posterior or base.from_text.') from error
  return TfidfVectorizer


def similarities(similarity: Callable[[Sequence[str]], np.ndarray], tokens: Tokens,
                 tokenizer: Tokenizer, experts: int) -> np.ndarray:
  """Similarity of the text before each token to each expert's text, [tokens, E].

  It is compared at the beginning of each block of a document. In the first block, which no text
  precedes, it is 0.

  Args:
    similarity: such as Similarity.
    tokens: the documents.
    tokenizer: the tokenizer of the tokens.
    experts: E.
  """
  result = np.zeros((len(tokens.ids), experts))
  for first, end in itertools.pairwise(tokens.starts):
    begins = range(first + selector.BLOCK, end, selector.BLOCK)
    if begins:
      before = [tokenizer.decode(tokens.ids[first:begin].tolist()) for begin in begins]
      for begin, cosines_E in zip(begins, similarity(before)):
        result[begin:min(begin + selector.BLOCK, end)] = cosines_E
  return result


def posterior_log_weights(nll_NE: np.ndarray, starts: np.ndarray, top: int) -> np.ndarray:
  """Log posterior [tokens, E] of the most probable experts, given what each gave to the tokens
  before."""
  before_NE = np.empty_like(nll_NE)
  for first, end in itertools.pairwise(starts):
    before_NE[first:end] = np.cumsum(nll_NE[first:end], 0) - nll_NE[first:end]
  return selector.log_softmax_of_top(-before_NE, top)


def averaged_nll(nll_NE: np.ndarray, log_weights_NE: np.ndarray) -> np.ndarray:
  """Negative log likelihood [tokens] of the weighted mean of the experts' probabilities."""
  return -selector.logsumexp(log_weights_NE - nll_NE)[:, 0]


def bits_per_byte(nll_NE: np.ndarray, log_weights_NE: np.ndarray, tokens: Tokens,
                  tokenizer: Tokenizer) -> dict:
  """The score of the averaged probabilities, see units.score."""
  nll_N = np.where(tokens.has_score, averaged_nll(nll_NE, log_weights_NE), 0.0)
  return units.score(nll_N, tokens, tokenizer)
