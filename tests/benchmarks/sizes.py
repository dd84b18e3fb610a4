"""The sizes that both sides of `python -m tests.benchmarks` compute with.

This module needs the standard library only, as sides.py does.
"""

import dataclasses
import json

# How transformers can compute a mixture's experts; the fastest is compared. Its third way,
# batched_mm, copies the weights of each token's experts: 8.7 GB a layer at the sizes below.
EXPERTS = 'eager', 'grouped_mm'


@dataclasses.dataclass(frozen=True)
class Sizes:
  """A Llama of 6.8 million parameters; a mixture has as many experts of that feed-forward width.

  Attributes:
    rows, length: of the batch of one step.
    matmul: m, k and n of the matmul whose rate counts as the machine's peak.
    characters: of the text that is tokenized.
    dtypes: of steps and matmuls.
  """
  vocab_size: int = 4096
  dim: int = 256
  ffn_dim: int = 688
  num_layers: int = 6
  num_heads: int = 4
  num_experts: int = 4
  top_k: int = 2
  rows: int = 8
  length: int = 256
  matmul: tuple[int, int, int] = (2048, 1024, 2048)
  characters: int = 8_000_000
  dtypes: tuple[str, ...] = ('float32', 'bfloat16')

  @property
  def tokens(self) -> int:
    """Of one step."""
    return self.rows * self.length

  @property
  def matmul_flops(self) -> int:
    m, k, n = self.matmul
    return 2 * m * k * n

  @property
  def products(self) -> list[tuple[int, int, int]]:
    """The matmuls of a dense step, but for attention: width in, width out, and how often.

    Each is one with weights, of all tokens; the step has one forward, and two in its gradient.
    """
    d, f, layers = self.dim, self.ffn_dim, self.num_layers
    return [(d, d, 4 * layers), (d, f, 2 * layers), (f, d, layers), (d, self.vocab_size, 1)]

  def write(self) -> str:
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def read(cls, text: str) -> 'Sizes':
    return cls(**{name: tuple(value) if isinstance(value, list) else value
                  for name, value in json.loads(text).items()})


QUICK = Sizes(vocab_size=64, dim=16, ffn_dim=32, num_layers=1, num_heads=2, rows=1, length=16,
              matmul=(64, 64, 64), characters=20_000, dtypes=('float32',))
