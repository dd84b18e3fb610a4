"""From text to batches, in this order: formats (records of files; streams has their bytes, pieces
cuts them, and json_files, csv_files, tables and records know one layout each), folders (the files
that a path names), corpora (documents of a domain), tokenizer and fast_tokenizer (with spelling,
the text of tokens, and framing, the marks around documents), tokens (token files on disk; changes
counts the documents that the tokenizer changes), text (these for a whole config), mixture (the
global order of training rows). demo is text to try it on; duplicates finds repeated text."""
