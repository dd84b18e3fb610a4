"""The benchmark of accelerators: on a CPU, with a tiny model, and with cases that fail."""

import json
import sys

import jax
import pytest

from btx_jax.devices import hardware
from btx_jax.devices.hardware import CHIPS
from btx_jax.model import config
from btx_jax.preflight import forecast
from btx_jax.preflight.topology import Topology
from tests.benchmarks import accelerator
from tests.benchmarks.accelerator import Case


@pytest.mark.parametrize('case', [Case('tiny'), Case('tiny', 1, 'grouped')])
def test_a_row_has_what_was_measured_beside_what_was_predicted(case, monkeypatch):
  """On eight devices of a chip that they are not, with an expert on each or none."""
  monkeypatch.setattr(hardware, 'chip_of_kind', lambda kind: CHIPS['h100'])
  monkeypatch.setattr(accelerator, '_TIMED', 0.0)  # the fewest steps
  row = accelerator.time_case(case)
  rows, length = accelerator._ROWS['tiny']
  assert row['tokens'] == rows * length * len(jax.devices())
  assert row['seconds'] > row['bound'] > 0 and row['steps'] >= 3
  assert row['mfu'] == pytest.approx(row['tokens'] * row['flops_per_token'] / row['seconds']
                                     / len(jax.devices()) / CHIPS['h100'].flops)
  assert row['predicted_peak'] > 0


def test_cases_that_fail_are_rows_and_the_file_makes_a_forecast(monkeypatch, tmp_path, capsys):
  """One is not known, one is stopped, one runs, and one has no time left."""
  out = tmp_path / 'out.json'
  known = Case('tiny', 4, 'pieces')
  seconds = {'unknown': 60.0, 'tiny': 0.01}
  real = accelerator.measured
  monkeypatch.setattr(accelerator, 'cases', lambda *_: [Case('unknown'), Case('tiny'), known])
  monkeypatch.setattr(accelerator, 'measured', lambda case, left, cache: real(
      case, seconds[case.model], cache) if case != known else {
          'name': case.name, 'experts': 4, 'seconds': 3.0, 'bound': 2.0, 'mfu': 0.4, 'peak': None})
  monkeypatch.setattr(sys, 'argv', ['accelerator', f'--out={out}'])
  accelerator.main()
  said = capsys.readouterr().out
  assert "exit code 1: KeyError: 'unknown'" in said and 'was stopped after 0 s' in said
  assert '(bound 2.0000 s, 1.50 times it) MFU 40.0%' in said
  found = json.loads(out.read_text())
  assert found['platform'] == 'cpu' and len(found['rows']) == 3
  chip = CHIPS['h100']._replace(kinds=(found['device_kind'],))
  assert forecast.read(str(out), Topology('here', chip, (), '')) == {'mixture': (1.5, 1)}
  monkeypatch.setattr(sys, 'argv', ['accelerator', f'--out={out}', '--seconds=0'])
  with pytest.raises(SystemExit, match='nothing could be measured'):
    accelerator.main()
  assert capsys.readouterr().out.count('no time was left') == 3


def test_an_accelerator_times_every_form_and_first_what_a_config_would_choose():
  for platform in ('gpu', 'tpu'):
    found = accelerator.cases(platform, quick=False)
    assert {case.dispatch for case in found} == set(config.DISPATCHES)
    assert {case.experts for case in found} == {0, 1, 4} and len({case.name for case in found}) == (
        len(found))
    for experts in (1, 4):
      assert next(case for case in found if case.experts == experts).automatic
  assert any(case.triton for case in accelerator.cases('gpu', quick=False))
