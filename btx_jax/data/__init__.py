"""From text to batches: formats (what files hold), corpora (documents of a domain), tokenizer,
tokens (files on disk), mixture (one global order of training rows); demo (text that Python
packages carry), text (all of that for a config); describe and duplicates (what the text is)."""
