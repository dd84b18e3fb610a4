"""How long forms of training take on several machines: formulas against counting, and the command.

tests/benchmarks/wall_time.py compares them with two processes on a shaped link.
"""

import json
import math
from typing import Any

import numpy as np
import pytest

from btx_jax import base
from btx_jax.commands import wall_time as command
from btx_jax.configs import study as recipe
from btx_jax.errors import UsageError
from btx_jax.outer import Outer
from btx_jax.run import lineage
from btx_jax.study import plan, wall_time
from btx_jax.study.wall_time import BACKWARD, Branches, Training, time_of
from tests import finished, studies

SIZE, RATE = 4e6, 1e8  # bytes, and bytes per second


def dense(steps=100, **fields):
  return Training('dense', steps, 0.5, 32, SIZE, **fields)


def experts(count, steps=100):
  return Branches(tuple((Training(f'expert/{i}', steps, 0.5, 32, SIZE),) for i in range(count)),
               (SIZE,) * count)


def ring(machines: int) -> tuple[np.ndarray, int]:
  """Sums a vector of each machine by passing pieces around; the results, and numbers sent by one.
  """
  given = np.random.default_rng(0).integers(0, 9, (machines, machines))
  held, sent = given.copy(), 0
  for gathers in (0, 1):
    for turn in range(machines - 1):
      before = held.copy()
      for machine in range(machines):
        piece, to = (machine + gathers - turn) % machines, (machine + 1) % machines
        held[to, piece] = before[machine, piece] + (0 if gathers else held[to, piece])
      sent += 1
  assert (held == given.sum(0)).all()
  return held, sent


@pytest.mark.parametrize('machines', [1, 2, 3, 8])
def test_a_ring_sends_what_the_formulas_say(machines):
  _, sent = ring(machines)
  assert wall_time.all_reduce(machines, machines) == pytest.approx(sent)
  assert wall_time.all_gather(machines, machines) == pytest.approx(sent / 2)


def test_one_machine_computes_everything_and_sends_nothing():
  form = (dense(), experts(3), dense(10))
  assert time_of(form, 1, RATE) == pytest.approx((0.5 * (100 + 300 + 10), 0, 0))
  assert time_of((dense(outer=Outer(4, 10)),), 1, RATE) == pytest.approx((50, 0, 0))


def test_the_times_of_each_form_by_hand():
  assert time_of((dense(),), 4, RATE) == pytest.approx((12.5, 100 * 0.06, 100 * 6e6))
  assert time_of((dense(outer=Outer(4, 30)),), 4, RATE) == pytest.approx((
      12.5, 4 * 0.06, 4 * 6e6))  # at steps 30, 60, 90 and 100
  assert time_of((dense(outer=Outer(2, 50)),), 4, RATE) == pytest.approx((
      12.5, (100 + 2) * 0.04, 102 * 4e6))  # in each pair, and between the pairs
  gathered = 0.75 * 3 * SIZE
  assert time_of((experts(3), dense(10)), 4, RATE) == pytest.approx((
      50 + 1.25, gathered / RATE + 10 * 0.06, 100 * SIZE + gathered + 10 * 6e6))


def test_an_expert_leaves_machines_idle_that_would_make_it_slower():
  slow = SIZE / 0.5  # sending a gradient takes as long as a step on one machine
  assert time_of((dense(),), 6, slow).total > 50
  found = time_of((experts(3),), 6, slow)
  assert found.compute == pytest.approx(50)
  assert found.exposed == pytest.approx(5 / 6 * 3 * SIZE / slow)  # only for the checkpoints


def test_two_machines_of_two_workers_each_meet_as_two_workers_do():
  assert time_of((dense(outer=Outer(4, 10)),), 2, RATE) == pytest.approx((
      25, 10 * 0.04, 10 * SIZE))


def test_rows_that_cannot_be_shared_evenly_are_rounded_up():
  assert time_of((dense(),), 3, math.inf).compute == pytest.approx(50 * 11 / 32)
  assert time_of((dense(),), 64, math.inf).compute == pytest.approx(50 / 32)


@pytest.mark.parametrize('machines, rounds', [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (7, 1),
                                              (10, 1 / 2)])
def test_experts_are_spread_over_the_machines_as_evenly_as_can_be(machines, rounds):
  assert time_of((experts(5),), machines, math.inf).compute == pytest.approx(50 * rounds)


def test_the_slowest_expert_has_the_machine_that_is_left():
  stage = Branches(tuple((dense(steps),) for steps in (10, 40, 20)), (SIZE,) * 3)
  assert time_of((stage,), 4, math.inf).compute == pytest.approx(10)
  assert time_of((stage,), 2, math.inf).compute == pytest.approx(20)


def test_workers_that_meet_at_every_step_send_what_one_run_does():
  assert time_of((dense(outer=Outer(4, 1)),), 4, RATE) == time_of((dense(),), 4, RATE)


def test_what_is_sent_during_the_backward_pass_waits_only_for_the_rest():
  shown, hidden = (time_of((dense(),), 4, RATE / 10, share) for share in (0, BACKWARD))
  assert hidden.exposed == pytest.approx(shown.exposed - BACKWARD * shown.compute)
  assert time_of((dense(),), 4, 100 * RATE, BACKWARD).exposed == 0


def test_at_the_break_even_link_both_take_equally_long():
  branches, baseline = (experts(4), dense(50)), (dense(500),)  # on three machines
  for hidden in (0, BACKWARD):
    bandwidth, is_below = wall_time.break_even(branches, baseline, 3, hidden)
    assert is_below
    assert time_of(branches, 3, bandwidth, hidden).total == pytest.approx(
        time_of(baseline, 3, bandwidth, hidden).total)
  # In closed form: seconds that the branches compute longer, and bytes that they send less.
  longer = 0.5 * 200 + 0.5 * 50 * 11 / 32 - 0.5 * 500 * 11 / 32
  less = 450 * wall_time.all_reduce(SIZE, 3) - wall_time.all_gather(4 * SIZE, 3)
  assert wall_time.break_even(branches, baseline, 3)[0] == pytest.approx(less / longer)
  swapped, is_below = wall_time.break_even(baseline, branches, 3)
  assert not is_below and swapped == pytest.approx(less / longer)


def test_a_form_may_be_faster_on_any_link_or_on_none():
  assert wall_time.break_even((dense(outer=Outer(4, 10)),), (dense(),), 4) == (math.inf, True)
  assert wall_time.break_even((dense(),), (dense(90),), 4) == (math.inf, False)
  assert wall_time.break_even((dense(),), (dense(),), 4) == (math.inf, False)


def test_what_all_forms_begin_with_ends_before_anything_is_apart():
  seed = Training('seed', 10, 0.5, 32, SIZE)
  forms = [(seed, experts(2), dense()), (seed, experts(2)), (seed, dense())]
  assert wall_time.shared_stages(forms) == 1
  assert wall_time.shared_stages(forms[:2]) == 1
  assert wall_time.shared_stages(forms[:1]) == 1
  assert wall_time.shared_stages([(seed,), (seed, dense())]) == 0


# From runs


class Seconds(dict):
  """A step of any program takes a second."""

  def __missing__(self, program):
    return 1.0


@pytest.fixture(scope='module')
def runs():
  return plan.make_plan(recipe.get_config(), 4096)


def names(form):
  return [[names(each) for each in stage.forms] if isinstance(stage, Branches) else stage.name
          for stage in form]


def test_the_forms_of_the_study(runs):
  form_of = lambda name: command.form_of(runs[f'seed-0/{name}'], Seconds())
  seed, new = ['trunk/seed', 'seed'], ('code', 'math', 'knowledge')
  apart = lambda family, kind: [[f'trunk/{family}/{domain}', f'{kind}/{domain}'] for domain in new]
  assert names(form_of('dense/blend')) == [*seed, 'dense/blend']
  assert names(form_of('sparse/redrawn')) == [*seed, 'sparse/redrawn']
  assert names(form_of('merge/posterior')) == [*seed, apart('expert', 'expert')]
  assert names(form_of('btx/unfinetuned')) == [*seed, apart('averaged', 'averaged')]
  assert names(form_of('btx/finetuned')) == [
      *seed, apart('averaged', 'averaged75'), 'btx/finetuned']
  assert names(form_of('ffn/ridge')) == [*seed, [[f'ffn/{domain}'] for domain in new]]
  assert form_of('dense/diloco')[-1].outer == Outer(4, 50, 1.0, 0.0)
  assert sum(stage.steps for stage in form_of('merge/learned')[-1].forms[0]) == recipe.EXPERT


def test_what_is_frozen_is_not_sent(runs):
  form_of = lambda name: command.form_of(runs[f'seed-0/{name}'], Seconds())
  whole, ffn = form_of('btx/unfinetuned')[-1], form_of('ffn/unfinetuned')[-1]
  model = runs['seed-0/seed'].model
  assert ffn.sizes == (4 * 3 * model.num_layers * model.dim * model.ffn_dim,) * 3
  assert whole.sizes[0] - ffn.sizes[0] == 4 * (
      model.vocab_size * model.dim + 4 * model.num_layers * model.dim**2
      + (2 * model.num_layers + 1) * model.dim)


@pytest.mark.parametrize('form', ['', 'split', 'crossover', 'later'])
def test_every_run_of_a_row_is_timed_once(form):
  runs = plan.make_plan(recipe.get_config(form), 4096)
  flat = lambda form: [each for stage in form for each in (
      [name for branch in stage.forms for name in flat(branch)]
      if isinstance(stage, Branches) else [stage.name])]
  for run in runs.values():
    trained = [each.plain_name for each in lineage(run) if each.steps]
    assert sorted(flat(command.form_of(run, Seconds()))) == sorted(trained), run.name


def test_experts_that_share_a_part_of_their_training_are_one_branch(tmp_path):
  config: Any = studies.get_config(tmp_path)
  train = lambda source: base.run(base.checkpoint(source), {'code': 1}, steps=5)
  config.runs = {'seed': config.runs.seed, 'trunk': train('seed'), 'a': train('trunk'),
                 'b': train('trunk'), 'c': train('seed'),
                 'mixed': base.run(base.mix('a', 'c', 'b'))}
  form = command.form_of(plan.make_plan(config, 330)['mixed'], Seconds())
  assert names(form) == ['seed', [['c'], ['trunk', 'a', 'b']]]
  assert form[1].sizes[1] == 2 * form[1].sizes[0]


# The command


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
  return finished.write(finished.two_mixtures(), str(tmp_path_factory.mktemp('work')))


def printed(capsys, *arguments, **options) -> dict:
  command.print_wall_times(*arguments, **options, as_json=True)
  return json.loads(capsys.readouterr().out)


def test_the_command_computes_with_what_runs_have_measured(complete, capsys):
  found = printed(capsys, complete, 8, [1.0, 10.0])
  rows = {row['name']: row for row in found['rows']}
  assert found['shared'] == ['seed'] and found['baseline'] == 'dense_with_the_same_flops'
  assert rows['btx']['kind'] == 'branches, finetune'
  assert rows['routed_by_a_linear_map']['kind'] == 'branches'
  dense = complete.runs['dense_with_the_same_flops']
  row = rows[dense.name]
  # From 4,000 to 5,000 tokens a second on one machine
  assert dense.tokens / 5000 / 8 < row['compute'] < dense.tokens / 4000 / 8
  assert row['flops'] == dense.flops  # without those of the seed
  size = 4 * parameters_of(dense)
  assert row['sent_by_each'] == pytest.approx(dense.steps * 2 * 7 / 8 * size)
  for link in row['links']:
    assert link['exposed'] == pytest.approx(row['sent_by_each'] * 8 / 1e9 / link['gbit'])
    assert link['total'] == pytest.approx(link['exposed'] + row['compute'])
  assert rows['btx']['break_even'].keys() == {'after_backward', 'during_backward'}
  assert rows['routed_by_a_linear_map']['break_even'] == {}  # it has other FLOPs


def parameters_of(run):
  return sum(math.prod(shape) for shape in (
      (run.model.vocab_size, run.model.dim, 2), (run.model.num_layers, 4, run.model.dim**2),
      (run.model.num_layers, 3, run.model.dim, run.model.ffn_dim),
      (2 * run.model.num_layers + 1, run.model.dim)))


def test_rows_can_be_chosen(complete, capsys):
  found = printed(capsys, complete, 8, [1.0], 'btx', 'routed_by_a_linear_map')
  assert found['baseline'] == 'routed_by_a_linear_map'
  assert [row['name'] for row in found['rows']] == ['btx', 'routed_by_a_linear_map']
  with pytest.raises(UsageError, match="--run=bt is not a row of wall_time, a run that no other"):
    command.print_wall_times(complete, 8, [1.0], 'bt')


def test_rows_that_are_not_measured_are_named(tmp_path, capsys):
  made = finished.write(finished.two_mixtures(), str(tmp_path))
  last = 'btx/of_the_first_three_only/then_everything'  # by the same program as `btx`
  for name in ('btx', last):
    (tmp_path / name / 'metrics.jsonl').unlink()
  assert printed(capsys, made, 8, [1.0])['not_measured'] == ['btx', last]
  with pytest.raises(UsageError, match=f'for btx, {last}'):
    command.print_wall_times(made, 8, [1.0], 'btx')


def test_workers_take_the_step_times_of_a_single_run(tmp_path, capsys):
  config: Any = finished.two_mixtures()
  train = lambda workers: base.run(base.checkpoint('seed'), {'code': 1}, steps=100,
                                   train={'workers': workers})
  config.runs = {'seed': config.runs.seed, 'one': train(1), 'four': train(4)}
  made = finished.write(config, str(tmp_path))
  path = tmp_path / 'four' / 'metrics.jsonl'
  path.write_text(json.dumps({'step': 100, 'tokens_per_second': 0.01}) + '\n')
  rows = {row['kind']: row for row in printed(capsys, made, 4, [1.0])['rows']}
  assert rows['DiLoCo']['compute'] == rows['synchronous']['compute'] < 1000


def test_the_tables_fit_80_columns(complete, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  command.print_wall_times(complete, 8, [1.0, 10.0, 100.0])
  out = capsys.readouterr().out
  assert max(map(len, out.splitlines())) <= 80
  assert 'Without what all rows share: seed.' in out
