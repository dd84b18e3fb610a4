"""Changes to the syntax tree of a chat template: an extension, and checks of time and size.

sandbox.py has the filters that the checks call: `repeated`, `counted` and `joined`.
"""

from typing import ClassVar

from jinja2 import ext, nodes, visitor


class Generation(ext.Extension):
  """{% generation %} marks answers in some templates; its body is written unchanged."""
  tags: ClassVar[set[str]] = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.CallBlock(self.call_method('inside'), [], [], body).set_lineno(line)

  def inside(self, caller):
    return caller()


class Bounds(visitor.NodeTransformer):
  """Adds checks of time and size to a parsed template, wherever it repeats or joins text."""

  def __init__(self):
    self._inside = 0  # of how many macros and blocks, whose text nothing else counts as it grows

  def visit_For(self, node):
    self._inside += not isinstance(node, nodes.For) or node.recursive
    self.generic_visit(node)
    self._inside -= not isinstance(node, nodes.For) or node.recursive
    size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
    node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(size), 'repeated')))
    return node

  visit_Macro = visit_CallBlock = visit_For

  def visit_Output(self, node):
    self.generic_visit(node)
    if self._inside:
      node.nodes = [each if isinstance(each, nodes.TemplateData) else _filter(each, 'counted')
                    for each in node.nodes]
    return node

  def visit_AssignBlock(self, node):
    self._inside += 1
    self.generic_visit(node)
    self._inside -= 1
    return node

  visit_FilterBlock = visit_AssignBlock

  def visit_Concat(self, node):
    self.generic_visit(node)
    return _filter(nodes.List(node.nodes), 'joined')


def _filter(node: nodes.Expr | None, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None)
