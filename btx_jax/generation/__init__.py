"""Text generation: weights laid out for decoding, a cache, sampling, and the loop around them."""
