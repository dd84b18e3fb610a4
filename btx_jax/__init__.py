"""Branch-Train-MiX (arXiv 2403.07816) in JAX and Flax.

Branch a pretrained Llama into one copy per domain, train the copies without any
communication, mix them into one mixture-of-experts model, and finetune that.

The letters after an underscore name the dimensions of an array:

  B  batch rows             T  positions in a row       D  model width
  F  feed-forward width     V  vocabulary               L  layers
  N  attention heads        K  key-value heads          H  head size
  E  experts                k  experts per token        C  expert capacity
  G  groups: of tokens in statistics, of query heads in attention

and on one device, while tokens are at their experts:

  n  tokens                 p  pairs (token, choice)    s  slots that rows are moved to
  S  devices that share     e  experts of the device    R  rows of an expert's buffer, S * C
     the experts            r  rows of all its experts  m  rows of one matmul
"""
