"""Exports the model of a complete run as a Hugging Face folder: the command `export`."""

from collections.abc import Iterator
import os
import resource
import time

from btx_jax import library
from btx_jax.convert import config_json, export, generation
from btx_jax.data import domains, text
from btx_jax.data.tokenizer import Tokenizer
from btx_jax.errors import UsageError
from btx_jax.escaping import markdown
from btx_jax.run import EDIT, HUGGING_FACE, MIX, RANDOM, Run, descent, lineage
from btx_jax.scoring import scores
from btx_jax.study import compatibility, context, manifest, routers, sources
from btx_jax.study.study import Study
from btx_jax.terminal import say


def export_run(study: Study, name: str, folder: str, dtype: str) -> None:
  """Writes a run's final model with its tokenizer and a model card, piece by piece.

  The parameters of a run of zero steps are computed while they are written, so only the runs it
  starts from need to be complete.

  Args:
    study: the study of the run.
    name: name of the run.
    folder: the folder to write; must not exist, or be empty.
    dtype: dtype of the weights, 'float32' or 'bfloat16'.

  Raises:
    UsageError: a run is not complete, its vocabulary is not the tokenizer's, or see
      export.export.
  """
  run = study.run(name)
  origin = _origin(run)
  export.check(folder, run.model, dtype, origin)
  if run.vocabulary:
    raise UsageError(f'{name!r} has a different vocabulary than the tokenizer of this config, '
                     f'which would be written with it. Its own folder is {run.folder}.')
  check_complete(study, run)
  for line in compatibility.remarks(run) if not run.steps else ():
    say(line)
  tokenizer = text.tokenizer(study.config, study.data_folder)
  found = generation.combine([generation_of(run, tokenizer), of_chats(study, run, tokenizer)])
  began = time.monotonic()
  written = export.export(
      folder, run.model, sources.final(study, run), dtype,
      max_length=context.length(run), balance_loss=run.objective.balance_loss,
      bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
      tokenizer_files=library.tokenizer_files(tokenizer),
      card=''.join(_card(study, run, origin)), descends_from=found,
      ram=int(study.config.mix.ram_gb * 1e9), identity=identity(study, run), origin=origin)
  seconds = time.monotonic() - began
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  say(f'{name} is in {folder}: {written:,} bytes of weights written in {seconds:.1f} s, '
      f'{written / seconds / 1e6:,.0f} MB/s; peak memory {peak / 1e9:.2f} GB')


def check_complete(study: Study, run: Run) -> None:
  """Raises UsageError unless everything that is read to export a run is complete."""
  sources.check_complete(study, sources.trained(run), 'export reads')


def generation_of(run: Run, tokenizer: Tokenizer) -> generation.Generation:
  """The settings of the folder that a run descends from, with the stop tokens of all its folders.

  The experts of a mixture may have other stop tokens than the model whose settings it takes.
  Folders with another vocabulary are left out, as their ids mean other tokens. The token that
  ended documents in training is a stop token too.
  """
  known = [each for each in descent(run) if each.folder]
  known += [each for each in lineage(run) if each.folder and not each.vocabulary]
  found = [generation.read(folder) for folder in dict.fromkeys(each.folder for each in known)]
  end = tokenizer.framing.end
  return generation.combine([*found, generation.Generation(stop_ids=(end.id,) if end else ())])


def of_chats(study: Study, run: Run, tokenizer: Tokenizer) -> generation.Generation:
  """The token that ends an answer, as a stop token, if the model answers conversations.

  It does if the run was trained on conversations, or if the config names a chat template.
  """
  of_chats = {domain.name for domain in domains.from_config(study.config.domains)
              if domain.format != domains.TEXT}
  if not study.config.tokenizer.chat_template and not any(
      of_chats & set(each.weights) for each in lineage(run)):
    return generation.UNKNOWN
  return library.of_chats(tokenizer)


def _origin(run: Run) -> str:
  """The model_type of the folders that a run descends from; '' if they are of several, or none."""
  kinds = {config_json.read_json(os.path.join(each.folder, config_json.FILE))['model_type']
           for each in lineage(run) if each.folder}
  return kinds.pop() if len(kinds) == 1 else ''


def identity(study: Study, run: Run) -> str:
  """Identifies the parameters by the run's lineage and every trained run or folder in it."""
  trained = {}
  for each in sources.trained(run):
    found = manifest.read(study.folder(each.name)) or {}
    trained[each.name] = [found['identity'], found['started'], found['seconds']]
  # The tokenizer decides how vocabularies are aligned.
  tokenizer = text.tokenizer(study.config, study.data_folder)
  fitted = [(routers.figures(study, each) or {}).get('files') for each in lineage(run)]
  return manifest.identity({'lineage': [each.spec() for each in lineage(run)], 'trained': trained,
                            'fitted': fitted, 'tokenizer': tokenizer.hash})


def _card(study: Study, run: Run, origin: str) -> Iterator[str]:
  """Yields the text of README.md: what the model is, how it was made, and its scores."""
  what = f'mixture of {run.model.num_experts} experts' if run.model.num_experts else 'dense model'
  architecture = config_json.ARCHITECTURES[config_json.kind_of(run.model, origin)]
  yield ('---\nlibrary_name: transformers\npipeline_tag: text-generation\n'
         'tags: [branch-train-mix]\n---\n\n'
         f'# {markdown(run.name)}\n\nA {what} ({architecture}), made with btx_jax, which is '
         'Branch-Train-MiX ([arXiv 2403.07816](https://arxiv.org/abs/2403.07816)) in JAX.\n\n'
         '## How it was trained\n\n'
         '| run | starts from | trained on | steps | tokens M | identity |\n'
         '|---|---|---|--:|--:|---|\n')
  ancestors = {each.name: each for each in lineage(run)}
  for each in (ancestors[name] for name in study.runs if name in ancestors):
    start = {MIX: 'a mixture of ', EDIT: 'an edit of ', RANDOM: 'random parameters',
             HUGGING_FACE: f'pretrained, content {each.content}'}.get(each.init, '')
    start += ', '.join(markdown(source.label) for source in each.sources)
    domains = ', '.join(f'{markdown(domain)} {weight:.0%}'
                        for domain, weight in each.weights.items())
    found = manifest.read(study.folder(each.name)) or {}
    yield (f'| {markdown(each.name)} | {start} | {domains} | {each.steps:,} | '
           f'{each.tokens / 1e6:,.2f} | {found.get("identity", "")} |\n')
  yield from scores_section(study, run)


def scores_section(study: Study, run: Run) -> Iterator[str]:
  """Yields a section of a README.md with the run's scores, if it has been measured."""
  measured = scores.read(study, run, scores.FINAL)
  if measured:
    yield '\n## Bits per byte on held-out text\n\n| domain | bits per byte |\n|---|--:|\n'
    for domain, score in measured.items():
      yield f'| {markdown(domain)} | {score["bits_per_byte"]:.3f} |\n'
