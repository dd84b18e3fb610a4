"""Names and texts of others, made harmless where they are shown: on a terminal, in Markdown.

HTML is escaped by jinja2 (commands/report.py), LaTeX by commands/table_files.py, and matplotlib
parses no mathtext in names (commands/drawing.py).
"""

import re

# Control characters but tabs and new lines; separators of lines; what changes the direction of
# writing; halves of surrogate pairs, which are bytes of names that are not UTF-8.
_CONTROL = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
_MARKDOWN = re.compile(r'[\\`*_\[\]<>|#~$&]')


def printable(text: str) -> str:
  r"""The text with characters that a terminal would act on, or cannot show, as in '\x1b'."""
  return _CONTROL.sub(lambda found: found[0].encode('unicode_escape').decode(), text)


def markdown(text: str) -> str:
  """The text as one line of Markdown that shows it unchanged, also in a cell of a table."""
  return _MARKDOWN.sub(r'\\\g<0>', ' '.join(printable(text).split()))
