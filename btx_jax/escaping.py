"""Escapes names and texts from elsewhere where they are shown: on a terminal, in Markdown.

HTML is escaped by jinja2 (commands/report.py), LaTeX by commands/table_files.py, and matplotlib
parses no mathtext in names (commands/drawing.py).
"""

import re

# Control characters other than tabs and new lines; line separators; characters that change the
# direction of text; surrogates, which stand for bytes of names that are not UTF-8.
_CONTROL = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
_MARKDOWN = re.compile(r'[\\`*_\[\]<>|#~$&]')


def printable(text: str) -> str:
  r"""The text, with '\x1b' and the like for characters that a terminal acts on or cannot show."""
  return _CONTROL.sub(lambda found: found[0].encode('unicode_escape').decode(), text)


def markdown(text: str) -> str:
  """The text as one line of Markdown that shows it unchanged, also in a cell of a table."""
  return _MARKDOWN.sub(r'\\\g<0>', ' '.join(printable(text).split()))
