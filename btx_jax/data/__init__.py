"""From text to batches, in this order: formats (records of files; streams has their bytes, pieces
cuts them, and json_files, tables and records know one layout each), folders (the files that a path
names), corpora (documents of a domain), tokenizer and fast_tokenizer, tokens (token files on disk),
text (these for a whole config), mixture (the global order of training rows). demo is text to try it
on; duplicates finds repeated text."""
