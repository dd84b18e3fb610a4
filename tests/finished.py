"""Studies that look finished: the files that jobs leave in a working directory, with made-up
figures. Nothing is trained, so tests of what is shown take no time."""

import json
import os
import random
import zlib

import numpy as np

from btx_jax import base
from btx_jax.data import domains, tokens
from btx_jax.run import MIX, Run, lineage
from btx_jax.scoring import error_bars, routing, scores
from btx_jax.study import manifest
from btx_jax.study.study import Study
from btx_jax.training import metrics

DOMAINS = ('code', 'knowledge', 'math', 'prose', 'law_and_regulation', 'web',
           'biomedical-abstracts')
BLEND = dict.fromkeys(DOMAINS, 1)
_UNITS = 30  # of each domain's held-out text


def two_mixtures():
  """A config of seven domains, two mixtures, a two-stage one, an ensemble and a rival, all with
  long names."""
  config = base.get_config()
  config.domains = {name: base.domain('/nowhere') for name in DOMAINS}
  config.tokenizer.vocab_size = 4096
  config.data.seq_len = 256
  config.model.update(dim=128, ffn_dim=352, num_layers=4, num_heads=4, num_kv_heads=4)
  config.train.batch_size = 8
  config.evaluation.oracle = True
  experts = {f'expert/{name}': base.run(base.checkpoint('seed'), {name: 1}, steps=130)
             for name in DOMAINS if name != 'prose'}
  config.runs = {
      'seed': base.run(base.random(), {**BLEND, 'prose': 7}, steps=500,
                       optimizer={'peak_lr': 3e-3}),
      **experts,
      'btx': base.run(base.mix('seed', *experts), BLEND, steps=400, optimizer={'peak_lr': 2e-3}),
      'btx/of_the_first_three_only/routers': base.run(
          base.mix('seed', *[*experts][:3]), BLEND, steps=50,
          train={'freeze': base.FREEZE_ALL_BUT_ROUTER}),
      'btx/of_the_first_three_only/then_everything': base.run(
          base.checkpoint('btx/of_the_first_three_only/routers'), BLEND, steps=400),
      'routed_by_a_linear_map': base.run(
          base.ensemble('seed', *experts, selector=base.posterior())),
      'dense_with_the_same_flops': base.run(
          base.checkpoint('seed'), BLEND, match_flops_of=(*experts, 'btx')),
  }
  return config


def write(config, workdir: str, at_hand: bool = True) -> Study:
  """Writes the working directory of a config whose runs are all complete; `at_hand` is Study's."""
  study = Study(config, workdir, at_hand)
  for name in config.domains:
    _write_text(study, name)
  for run in study.runs.values():
    spec = json.loads(json.dumps(manifest.full_spec(
        run, 'tokens', dict.fromkeys(config.domains, 'text'))))
    started = manifest.begin(run.name, spec)
    manifest.write(study.folder(run.name), started | {
        'state': manifest.COMPLETE, 'steps_done': run.steps, 'seconds': 0.4 * run.steps,
        'tokens_by_domain': {name: round(share * run.tokens)
                             for name, share in run.weights.items()},
        'started': '2026-11-28T05:04:36+00:00', 'saved': '2026-11-28T06:04:36+00:00',
        'devices': '1 x cpu', 'processes': 1, 'versions': {
            'btx_jax': '0.1.0, commit 0123456789ab', 'python': '3.11.7', 'jax': '0.10.2'}})
    with open(os.path.join(study.folder(run.name), metrics.NAME), 'w', encoding='utf-8') as file:
      for step in range(10, run.steps + 1, 10):
        file.write(json.dumps(_line(run, step)) + '\n')
    for model in scores.models_of(study, run):
      scores.write(study, run, model.stage, {
          name: _score(run, model.stage, name) for name in config.domains})
      if model.stage in scores.ALONE and run.model.num_experts and config.evaluation.oracle:
        scores.write(study, run, scores.ALONE[model.stage], {
            name: _alone(run, model.stage, name) for name in config.domains})
  return study


def _write_text(study: Study, domain: str) -> None:
  folder = os.path.join(study.data_folder, domain)
  found, = (each for each in domains.from_config(study.config.domains) if each.name == domain)
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as file:
    json.dump({'hash': {'held_out': domain, 'train': 'text'}, 'skipped': {'count': 12},
               'made_from': tokens._made_from(found, None, study.config.data.held_out)
               | {'tokenizer': 'tokens', 'text': '1 files, 2 bytes'},
               'train': {'documents': 1234, 'bytes': 4567890, 'tokens': 1234567},
               'held_out': {'documents': 21, 'bytes': 94277, 'tokens': 32238}}, file)


def _bits(run: Run, stage: str, domain: str) -> float:
  """A score that falls with the share of training on a domain, and is bad for averages."""
  ancestors = [each for each in lineage(run) if each is not run or stage == scores.FINAL]
  seen = sum(each.steps * each.weights.get(domain, 0.0) for each in ancestors)
  if run.selector or (run.init == MIX and stage == scores.FINAL):
    seen *= 1.5
  averaged = 0.4 if stage != scores.FINAL else 0.0
  narrow = 0.8 if len(run.weights) == 1 and domain not in run.weights else 0.0
  hardness = 1.2 + 0.25 * DOMAINS.index(domain)
  return hardness * (0.6 + 0.4 * np.exp(-seen / 300)) + averaged + narrow


def _score(run: Run, stage: str, domain: str) -> dict:
  rng = np.random.default_rng(zlib.crc32(f'{run.name} {stage} {domain}'.encode()))
  text = np.random.default_rng(zlib.crc32(domain.encode()))
  size, hardness = text.integers(1000, 5000, _UNITS), text.gamma(20, 1 / 20, _UNITS)
  bits = _bits(run, stage, domain) * hardness * rng.normal(1, 0.01, _UNITS)
  nll = bits * size * np.log(2)
  result = {'bits_per_byte': error_bars.bits_per_byte(nll.sum(), int(size.sum())),
            'documents': 21, 'tokens': 32000, 'bytes': int(size.sum()),
            'units': {'nll': nll.tolist(), 'bytes': size.tolist()}}
  if run.selector:
    result |= {'share': rng.dirichlet([1] * len(run.expert_names)).tolist(), 'switches': 3.5,
               'forward_flops': 3.4e6}
  elif run.model.num_experts and stage != scores.AVERAGE:
    result |= {'gates': rng.dirichlet([0.5] * run.model.num_experts, run.model.num_layers).tolist(),
               'sample': _sample(domain, run.model.num_experts, rng),
               'routing': _routing(run, rng)}
  return result


def _alone(run: Run, stage: str, domain: str) -> dict:
  """The scores of each expert alone."""
  found = [_score(run, f'{stage} {number}', domain) for number in range(run.model.num_experts)]
  return {'bits_per_byte': [score['bits_per_byte'] for score in found], 'units': {
      'nll': [score['units']['nll'] for score in found], 'bytes': found[0]['units']['bytes']}}


def _routing(run: Run, rng) -> dict:
  """First choices, as routing.count returns them."""
  pieces, experts, layers = [' the', 'ing', '12', '\n', '("'], run.model.num_experts, [0, 2, 3]
  return {'first': rng.integers(1, 9000, (run.model.num_layers, experts)).tolist(),
          'layers': layers, 'pieces': pieces,
          'by_piece': rng.integers(0, 90, (len(layers), len(pieces), experts)).tolist(),
          'by_class': rng.integers(
              100, 900, (len(layers), len(routing.CLASSES), experts)).tolist()}


def _sample(domain: str, experts: int, rng) -> dict:
  """Two documents and their marks, which stand for no text."""
  words = [f'{word} ' for word in f'some words of {domain}, one document after another,'.split()]
  pieces = ['', *words * 5, '', '', *words * 6, '']
  return {'pieces': pieces, 'gates': rng.dirichlet([0.4] * experts, len(pieces)).tolist()}


def _line(run: Run, step: int) -> dict:
  """A line of metrics.jsonl."""
  rng = random.Random(f'{run.name} {step}')
  loss = 3 + 4 * np.exp(-step / 100) + rng.gauss(0, 0.05)
  line = {'step': step, 'time': 1795848552.9 + step, 'loss': loss,
          'loss_by_domain': {name: loss + 0.1 * i for i, name in enumerate(run.weights)},
          'tokens_per_second': rng.uniform(4000, 5000), 'mfu': 0.287, 'lr': 1e-3}
  if run.model.num_experts:
    even = np.full((run.model.num_layers, run.model.num_experts), 1 / run.model.num_experts)
    line['routing'] = {'load': even.tolist(), 'entropy': [1.0] * run.model.num_layers,
                       'mutual_information': [0.5] * run.model.num_layers}
  return line
