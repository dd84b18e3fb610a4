"""From text to batches: corpora (documents of a domain), tokenizer, tokens (files on disk),
mixture (one global order of training rows); demo (text that Python packages carry)."""
