"""Names are drawn as they are, whatever they look like to matplotlib; and nothing warns."""

from matplotlib.text import Text
import numpy as np
import pytest

from btx_jax.commands import drawing, mixture_pictures, pictures
from btx_jax.scoring import decomposition

NAMES = ['a$x', '_hidden', '<b>&"\'', '$\\frac{1}{2}$', 'мат^{a}', '日\t']
ENTRIES = [{'difference': 0.1 * i, 'error': 0.02 * i or None, 'spread': 0.01}
           for i in range(len(NAMES))]
RUN = {'tokens': [1, 2], 'flops': [1e9, 2e9], 'loss': [3.0, 2.0],
       'loss_by_domain': [dict.fromkeys(NAMES, 1.0)] * 2}
GATES = {name: np.full((2, len(NAMES)), 0.1) for name in NAMES}
FIGURES = np.full((3, 2, len(NAMES)), 0.1)
PARTS = {kind: 1.0 + 0.1 * i for i, kind in enumerate(decomposition.SCORES)}
PICTURES = {
    'parts': lambda: mixture_pictures.decomposition(
        dict.fromkeys([*NAMES, 'mean'], dict.fromkeys(NAMES, PARTS))),
    'choices': lambda: mixture_pictures.choices(
        dict.fromkeys(NAMES, GATES), dict.fromkeys(NAMES, NAMES)),
    'differences': lambda: pictures.differences(
        dict.fromkeys([*NAMES, 'mean'], ENTRIES), NAMES, NAMES[0]),
    'curves': lambda: pictures.curves(dict.fromkeys(NAMES, RUN)),
    'curves_by_domain': lambda: pictures.curves_by_domain(dict.fromkeys(NAMES, RUN), NAMES),
    'experts': lambda: pictures.experts({'before': GATES}, NAMES),
    'load': lambda: pictures.load([1, 2, 3], FIGURES, FIGURES[:, :, 0], FIGURES[:, :, 0], NAMES),
    'graph': lambda: pictures.graph(
        {name: NAMES[:i][-1:] for i, name in enumerate(NAMES)}, dict.fromkeys(NAMES, 'done')),
}


@pytest.mark.parametrize('name', PICTURES)
def test_names_are_drawn_as_they_are(monkeypatch, name):
  draw, shown = drawing.png, []

  def png(figure):
    result = draw(figure)
    shown.extend(text.get_text() for text in figure.findobj(Text) if text.get_visible())
    return result

  monkeypatch.setattr(drawing, 'png', png)
  assert PICTURES[name]().startswith(b'\x89PNG')  # and a warning would be an error
  for each in NAMES[:-1]:
    assert any(each in text for text in shown), each
  # The last as an escape, unless a font for it is installed.
  assert any('\\u65e5\\t' in text or '日\\t' in text for text in shown)


def test_differences_are_drawn_in_their_place_with_their_errors(monkeypatch):
  """Those far worse than the better half are arrows at the edge, so the others have room."""
  figures = []
  monkeypatch.setattr(drawing, 'png', figures.append)
  values = {'seed': 0.0, 'btx': -0.2, 'dense': -0.25, 'expert': 9.0}
  entries = [{'difference': value, 'error': 0.01 if value else None, 'spread': None}
             for value in values.values()]
  pictures.differences({'code': entries, 'mean': entries}, list(values), 'seed')
  axis = figures[0].axes[0]
  points = [line for line in axis.get_lines() if line.get_marker() in 'o>']
  assert [line.get_marker() for line in points] == ['o', 'o', 'o', '>']
  assert [line.get_xdata()[0] for line in points[:3]] == [0.0, -0.2, -0.25]
  assert points[3].get_xdata()[0] < axis.get_xlim()[1] < 0.1
  bars = [line.get_xdata() for line in axis.get_lines() if len(line.get_xdata()) == 2
          and len(set(line.get_xdata())) == 2 and line not in points]
  np.testing.assert_allclose(bars, [[-0.21, -0.19], [-0.26, -0.24]])
  assert [text.get_text() for text in axis.texts] == [
      '0', '-0.200 ±0.010', '-0.250 ±0.010', '+9.000 ±0.010']


def test_the_parts_of_a_score_lead_from_the_expert_to_the_mixture(monkeypatch):
  figures = []
  monkeypatch.setattr(drawing, 'png', figures.append)
  untrained = PARTS | {'oracle_start': 1.0, 'final': None, 'oracle_final': None}
  mixture_pictures.decomposition({'mean': {'btx': PARTS, 'ridge': untrained}})
  axis = figures[0].axes[0]
  bars = [(round(bar.get_x(), 6), round(bar.get_x() + bar.get_width(), 6)) for bar in axis.patches]
  # own 1.0, oracle_start 1.2, start 1.3, final 1.5; then without averaging and without a finetune.
  assert bars == [(1.0, 1.2), (1.2, 1.3), (1.5, 1.3), (1.0, 1.0), (1.0, 1.3)]
  ends = [line.get_xdata()[0] for line in axis.get_lines() if line.get_marker() == 'o']
  assert ends == [1.0, 1.5, 1.0, 1.3]


def test_first_choices_are_stacked_over_the_layers(monkeypatch):
  figures = []
  monkeypatch.setattr(drawing, 'png', figures.append)
  shares = {'code': [[0.25, 0.75], [1.0, 0.0]], 'math': [[0.5, 0.5], [0.0, 1.0]]}
  mixture_pictures.choices({'a': shares, 'b': shares}, {'a': ['seed', 'code'], 'b': ['code', 'x']})
  assert len(figures[0].axes) == 4
  first, _, third, _ = (axis.patches for axis in figures[0].axes)
  assert [(bar.get_y(), bar.get_height()) for bar in first] == [
      (0, 0.25), (0, 1), (0.25, 0.75), (1, 0)]
  assert first[2].get_facecolor() == third[0].get_facecolor()  # 'code' in both mixtures


def test_another_font_is_used_for_what_the_first_lacks():
  # A letter of STIX, which comes with matplotlib, that DejaVu Sans does not have.
  stix, default = (drawing.characters(path) for path in _fonts('STIXGeneral', 'DejaVu Sans'))
  letter = min(letter for letter in stix - default if letter.isalpha())
  write = drawing.Writer([f'a{letter}'])
  assert write(f'a{letter}') == f'a{letter}'
  assert write.style['fontfamily'][0] == 'sans-serif' and len(write.style['fontfamily']) == 2


def test_a_font_of_boxes_draws_nothing():
  assert not [family for family, _ in drawing.fallbacks('') if 'Last' in family]


def _fonts(*families):
  from matplotlib import font_manager
  return [font_manager.findfont(family) for family in families]
