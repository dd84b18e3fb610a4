"""Every field of a config, once. Configs start from get_config().

The sections `model`, `optimizer` and `train` are the fields of the dataclasses that they become:
their defaults and descriptions are in model/config.py and run.py.
"""

from collections.abc import Iterable
import dataclasses

from ml_collections import ConfigDict, FieldReference

from btx_jax.model.config import Config
from btx_jax.outer import Outer
from btx_jax.recipe import AS_BEFORE, NORMAL, ROUTER_STD
from btx_jax.run import (
  CHECKPOINT,
  EDIT,
  ENSEMBLE,
  HUGGING_FACE,
  MIX,
  RANDOM,
  Objective,
  Optimizer,
)
from btx_jax.selector import POSTERIOR, TFIDF

# For a run's train={'freeze': ...}.
FREEZE_EXPERTS = ('/experts/',)
# Leaves the feed-forward layers, of a mixture its experts: branches that need no averaging.
FREEZE_ALL_BUT_EXPERTS = ('^(?!.*/(gate|up|down)$)',)
FREEZE_ALL_BUT_ROUTER = ('^(?!.*/router)',)  # leaves the router's bias free too, if it has one


def get_config() -> ConfigDict:
  """The defaults. A config adds `domains` and `runs`."""
  config = ConfigDict()
  # Everything random derives from this and from the name of the run.
  config.seed = 0
  # () trains each run once, with config.seed. Seeds, as in (0, 1, 2), train every run once for each
  # of them instead, in directories seed-0/RUN, seed-1/RUN and so on; the table then has the mean
  # and the spread over the seeds. The text, its tokenizer and what is held out are the same for
  # all of them.
  config.seeds = ()

  # The text: name -> domain(...), see below.
  config.domains = ConfigDict()

  # How text becomes tokens.
  config.tokenizer = ConfigDict({
      # A sentencepiece model, a tokenizer.json (pip install 'btx_jax[hf]'), or a folder with
      # either. If empty, a sentencepiece model is trained on the text of all domains.
      'path': '',
      # Pieces of a tokenizer that is trained.
      'vocab_size': 32_000,
      # Characters of each domain that it is trained on.
      'sample_chars': 2_000_000,
      # Name of the token before each document, or 'none'. If empty, the tokenizer decides
      # (btx_jax/data/framing.py).
      'bos': '',
      # Name of the token after each document, or 'none'. If empty, the end-of-text token, not
      # the one that ends a chat turn.
      'eos': '',
      # How special tokens in the text (<|im_start|>) are read: as 'text', or with 'encode' as
      # those tokens. In domains of conversations and pairs they are always those tokens.
      'special': 'text',
      # The name of a chat template, 'chatml' or 'llama3'. If empty, the tokenizer's own is used.
      'chat_template': '',
  })

  # How tokens become training rows, and what is held out.
  config.data = ConfigDict({
      # Tokens per row.
      'seq_len': 1024,
      # Share of the documents that is held out from training, for domains that do not set their own
      # `held_out`.
      'held_out': 0.02,
      # Share of a domain's records (lines, rows, files) that may be unusable: they are skipped
      # and counted. More than this is an error.
      'max_skipped': 0.1,
      # Processes that tokenize a large domain. If 0, one per core, up to 16. The tokens do not
      # depend on it.
      'processes': 0,
  })

  # Sizes of the model, and how it is computed.
  config.model = _section(
      Config, without=('num_experts', 'router_bias'), vocab_size=0, dim=512, ffn_dim=1408,
      num_layers=8, num_heads=8, num_kv_heads=8)

  # AdamW as in the paper (4.1.2), see btx_jax/training/optim.py.
  config.optimizer = _section(Optimizer)

  # One training step: its rows, its loss, what it leaves frozen, and how many workers share it.
  config.train = _section(
      Objective, Outer,
      # Rows per step, over all devices, workers and microbatches.
      batch_size=32,
      # Microbatches per step.
      microbatches=1,
      # A step whose loss, gradient or updated parameters are not finite ends the run. With n here,
      # up to n of them in a row are skipped instead: parameters and Adam's moments stay as they
      # were. `status` shows how many. This can be changed while a run is stopped.
      skip_nonfinite=0)

  # How models are mixed.
  config.mix = ConfigDict({
      # Standard deviation of the new routers' weights.
      'router_std': ROUTER_STD,
      # Memory for an export, in GB (10**9 bytes), beyond the 0.3 or so that Python and jax take.
      # An export reads tensors in pieces that fit.
      'ram_gb': 4.0,
  })

  # Names of runs that are trained as one program, side by side, each on its slice of
  # mesh.expert; () trains one after the other. Only domains, steps and learning rates may differ.
  # The result is the same.
  config.stacked = ()

  # Devices along each axis. -1 takes all that are left. 0 is chosen automatically: for `expert` as
  # many as divide the experts of the largest mixture and fit the others, for `fsdp` as many as the
  # training state needs to fit in memory.
  config.mesh = ConfigDict({
      # Copies of the model.
      'data': -1,
      # Parameters and optimizer state are sharded, and gathered for use.
      'fsdp': 0,
      # Each device holds experts of its own; outside mixtures this axis acts as `fsdp`.
      'expert': 0,
      # Heads, feed-forward width and vocabulary are split, and computed in parts: for devices
      # with a fast connection. Rows are shared among the other axes only.
      'tensor': 1,
  })

  # Bits per byte on held-out text.
  config.evaluation = ConfigDict({
      # Steps between evaluations during a run; 0 is none. The table is measured at the end in any
      # case. The step with the lowest held-out loss is saved and kept, for
      # base.checkpoint(RUN, step='best'). That loss is in bits per byte, over the domains that the
      # run is trained on, with the weights of its training rows.
      'every': 0,
      # Held-out tokens of each domain, in whole documents (at least one). Claims below the table
      # need 20 documents, or blocks of 1,024 tokens of longer ones. Files that a domain names in
      # `held_out` are always measured whole.
      'tokens': 65_536,
      # Tokens from the start of one window of held-out text to the start of the next. 0 is
      # data.seq_len: windows do not overlap, and tokens at the beginning of one have little
      # context. With a smaller stride, only the last `stride` tokens of a window count, and those
      # before them are context. Published perplexities are often measured like this. It takes
      # data.seq_len / stride times as long.
      'stride': 0,
      # Rows per batch. 0 is 32, or as few more as the devices can share evenly.
      'batch_size': 0,
      # Also measures each mixture without each of its experts in turn, which shows which expert
      # helps which domain. It takes as long as measuring the mixture once per expert. Mixtures of
      # the router 'hash' are left out.
      'mask_experts': False,
      # Also measures, for each mixture of whole experts, every expert alone beside the weights that
      # all of them share, before and after the mixture is trained. With the scores of the rows of
      # the table this shows what averaging the experts cost, what routing cost, and what the
      # finetune gained. It takes about as long as measuring the mixture once per expert and stage.
      'oracle': False,
      # Tasks to score models on: built-in tasks, and tasks of lm-evaluation-harness. Built-in tasks
      # need the extra `demo`, ask about text that no run is trained on, and are scored for every
      # model of the table. 'arithmetic', 'factbook': the text generated greedily must equal the
      # answer. 'code': the line must parse with the generated end. 'arithmetic_choice',
      # 'factbook_choice', 'code_choice', which suit small models: the right one of four answers
      # must be the likeliest per byte. Other names are tasks of the harness
      # (pip install 'btx_jax[eval]'), 'gsm8k:8' with 8 shots, on which the command evaluate scores
      # --run. See docs/evaluate.md.
      'tasks': (),
  })

  # Steps between lines of metrics.jsonl.
  config.log_every = 10
  # Steps between checkpoints; the end of a run is always saved.
  config.checkpoint_every = 500
  # After this many saves in a row have failed, because the disk is full or does not work, the run
  # ends. Until then it continues, and tries again after checkpoint_every steps. It always ends if
  # a save fails that is needed: at the end, after SIGTERM, or because another run starts from it.
  config.checkpoint_patience = 3
  # Services that also get the figures of metrics.jsonl; by default none: 'tensorboard' (event files
  # in the directory of each run), 'wandb' (Weights & Biases), 'mlflow'. See docs/sinks.md.
  config.sinks = ()
  # How many of a run's newest checkpoints are kept, besides the best one (evaluation.every) and
  # those that other runs start from.
  config.checkpoints_kept = 2
  # Checkpoints at multiples of this many steps are saved and never deleted; 0 is none.
  config.checkpoints_kept_every = 0

  # A folder of finished rows, which the command `rows` writes: a run that is not in the working
  # directory, and has a row there, is not trained again unless another run needs its parameters.
  # Tables show the scores of its row. '' is none. See docs/rows.md.
  config.rows = ''

  # Thresholds of the checks under the table, in bits per byte.
  config.checks = ConfigDict({
      # How much better than the seed an expert must be on its own domain.
      'expert_gain': 0.0,
      # How much worse than the seed the mixture may be on a domain without an expert.
      'seed_slack': 0.01,
      # How much worse than an expert the mixture may be on that expert's domain.
      'specialist_gap': 0.05,
  })

  # The runs: name -> run(...), see below.
  config.runs = ConfigDict()

  config.lock()  # a misspelt field is an error
  config.domains.unlock()
  config.runs.unlock()
  return config


def _section(*classes, without: tuple[str, ...] = (), **own) -> ConfigDict:
  """The fields of dataclasses with their defaults.

  Args:
    classes: the dataclasses.
    without: fields that a config does not set.
    own: values of fields that have no default there, and of fields that only a config has.
  """
  return ConfigDict(own | {
      field.name: field.default for cls in classes for field in dataclasses.fields(cls)
      if field.default is not dataclasses.MISSING and field.name not in without})


def domain(paths=(), text_field: str = 'text', separator: str = '',
           source: str = 'files', id_field: str = '',
           held_out: float | str | Iterable[str] = (), format: str = 'text') -> ConfigDict:
  """Text of one kind.

  A domain without `paths`, but with files in `held_out`, is only measured: every run is scored on
  it, but no run can be trained on it.

  Args:
    paths: directories, globs or files of plain text, JSON (an object a line, an array, or a
      single object), CSV, Parquet or Arrow (pip install 'btx_jax[parquet]') or ArrayRecord. The
      content of a file decides which. Text, JSON and CSV may be compressed with gzip, bzip2, xz or
      zstd (pip install 'btx_jax[zstd]').
    text_field: the field or column that holds the text; 'meta.text' is the field text of the
      object or struct meta. '': the records of an ArrayRecord file are the text itself, not JSON.
    separator: splits a plain text file into documents; '' makes it one document. Its line ends
      match those of any convention.
    source: 'files', or the name of text that Python packages carry (btx_jax/data/demo.py).
    id_field: the field or column that holds the document's id, stored with the tokens; '' is none.
    held_out: a share of the documents, between 0 and 1, which is held out from training; or the
      files of a validation or test set, named and read like `paths`. Their text is measured, and
      copies of their documents are left out of the training text of all domains. () means the
      share data.held_out.
    format: what each record is: 'text', 'chat' or 'pairs'. 'chat' is a conversation
      (btx_jax/data/chats.py), rendered by the tokenizer's chat template. Only the assistant's
      answers are trained on and scored, and rows hold whole conversations. `text_field` then names
      the field with the messages; 'text' means the usual fields. 'pairs' is a chosen and a
      rejected answer to one prompt (btx_jax/data/pairs.py), for runs with train.loss 'dpo' or
      'simpo'. Only the chosen answers are scored.
  """
  return ConfigDict({'source': source, 'paths': _strings(paths), 'text_field': text_field,
                     'separator': separator, 'id_field': id_field, 'format': format,
                     # A config may set either kind of value later.
                     'held_out': FieldReference(held_out, field_type=object)})


def _strings(given: str | Iterable[str]) -> tuple[str, ...]:
  return (given,) if isinstance(given, str) else tuple(given)


def run(init: ConfigDict, domains: dict[str, float] | None = None, steps: int = 0,
        match_flops_of: tuple[str, ...] = (), match_total_flops_of: str = '',
        model: dict | None = None, optimizer: dict | None = None, train: dict | None = None
        ) -> ConfigDict:
  """One training run. Without domains and steps it is the model that it starts from, and takes no
  space of its own.

  Args:
    init: how it starts: random(), checkpoint(RUN), mix(RUNS), hugging_face(FOLDER), ensemble(RUNS),
      or from a mixture by extend, replace or drop.
    domains: weight of each domain in the rows; weights need not add up to 1.
    steps: optimizer steps.
    match_flops_of: instead of `steps`: train for the FLOPs that these runs take together. What a
      run freezes saves FLOPs: the gradients that are not computed do not count.
    match_total_flops_of: instead of `steps`: train until this run has taken as many FLOPs as that
      one, counting for both every run that it descends from.
    model, optimizer, train: fields of the section of that name that differ in this run.
  """
  return ConfigDict({
      'init': init, 'domains': {name: float(weight) for name, weight in (domains or {}).items()},
      'steps': steps, 'match_flops_of': _names(match_flops_of),
      'match_total_flops_of': match_total_flops_of, 'model': model or {},
      'optimizer': optimizer or {}, 'train': train or {}})


def random() -> ConfigDict:
  """Starts from random parameters."""
  return ConfigDict({'kind': RANDOM, 'runs': ()})


def checkpoint(run_name: str, step: int | str = 0, state: bool = False, redraw: float = 0.0
               ) -> ConfigDict:
  """Starts from another run: to branch a seed, or to continue training.

  Without `state`, only the parameters are taken: Adam's moments and count, the order of the data,
  the warmup and the schedule of the learning rate start over. With `state`, only the warmup and the
  schedule start over, for the steps of the new run. They continue too if the rate was constant
  until then (optimizer.schedule 'constant', or 'wsd' before its decay) and this run has one of
  these two schedules. Then this run is bit for bit the rest of a longer run, and its decay is over
  its own last steps.

  Args:
    run_name: the run to start from.
    step: the number of its steps to start after; 0 is its end. A step that a run of the config
      starts from is saved and kept. If the other run is already past the step, the step must be
      one that was kept (config.checkpoints_kept, config.checkpoints_kept_every). The other run need
      not be complete: train from it with --run=NAME. 'best' is the step with the lowest held-out
      loss among those that were evaluated (config.evaluation.every) and the end. It is looked up
      when this run starts, and stays the same from then on. The other run must be complete, or have
      been stopped after an evaluation.
    state: whether to take Adam's moments and count too, and to read on in the data where the other
      run stopped. The trained parameters, the domains and their weights, data.seq_len,
      train.batch_size, optimizer.b1 and optimizer.b2 must be the same.
    redraw: the share of the hidden units of each feed-forward layer whose weights are drawn again,
      from a normal distribution with the mean and standard deviation that they have. Mix several
      such runs of one seed for Drop-Upcycling (arXiv 2502.19261, which uses 0.5); 1 makes random
      experts.
  """
  return ConfigDict({'kind': CHECKPOINT, 'runs': (run_name,), 'step': step, 'state': state,
                     'redraw': redraw})


def mix(*run_names: str, averaged: tuple[str, ...] = (), rules: dict[str, str] | None = None,
        arrangement: str = 'whole', chunks: int = 1, allow: tuple[str, ...] = (),
        routers: ConfigDict | None = None) -> ConfigDict:
  """Starts from a mixture of these runs' models. Naming one run several times upcycles it.

  Args:
    run_names: the runs that become the experts, in order; lists of names work too.
    averaged: the runs whose mean becomes everything outside the feed-forward layers, each counted
      once; () averages the experts' runs. So a run can be averaged without becoming an expert, or
      the reverse.
    rules: {regex: how} for parameters that should not be the plain mean. The first regex found in
      the parameter's path (attn/q, embed, norm/scale ...) applies. 'tokens' weights each run by
      the tokens it was trained on since the last common ancestor; the name of a run takes that
      run's parameter.
    arrangement: 'whole' makes each run one expert (paper 3.2). 'split' cuts each run into `chunks`
      experts, multiplies their outputs by `chunks` and gives them equal routers at the start: with
      the router 'top_k', and model.top_k a multiple of `chunks`, the mixture starts exactly as the
      unsplit one with top_k / chunks; otherwise with outputs of the same expected size.
      'plain_split' omits both (the paper's form, 3.3), so that outputs start `chunks` times too
      small. 'blend' builds expert n from the n-th part of every run (paper 3.3); its start is not
      exact.
    chunks: the pieces that each run is split into.
    allow: differences between the runs to accept, which are errors otherwise: 'rope' (rotary
      settings), 'norm_eps', 'vocabulary', 'seed' (not trained from one seed). The mixture takes
      the first three from the first run that is averaged. Rows of embedding and head are matched
      by token: tokens that a run lacks take the first run's row, tokens that the first run lacks
      are dropped.
    routers: how they begin: from_text(...), or None for random ones (the paper's).
  """
  return ConfigDict({'kind': MIX, 'runs': _names(run_names), 'averaged': _names(averaged),
                     'rules': tuple((rules or {}).items()), 'arrangement': arrangement,
                     'chunks': chunks, 'allow': _names(allow),
                     'routers': routers or from_text(NORMAL)})


def extend(mixture: str, *run_names: str, allow: tuple[str, ...] = (),
           routers: ConfigDict | None = None, state: bool = False) -> ConfigDict:
  """Starts from a mixture with further experts, after those that it has.

  The old experts and all shared weights keep their bits. Of the new ones only the feed-forward
  layers are taken, so they must have been trained beside the same shared weights
  (FREEZE_ALL_BUT_EXPERTS).

  Args:
    mixture: the run to start from: any run whose model is a mixture.
    run_names: the runs that become the new experts, in order; lists of names work too.
    allow: ('shared',) accepts experts that were trained beside other shared weights.
    routers: how they begin: from_text(...), or None for routers as the mixture's own were made. If
      those were set from text, so are these, reusing the stored sums of old domains; if they were
      random, the old experts keep their columns.
    state: whether to take the mixture's optimizer state as well; see checkpoint. Shared weights,
      old experts and kept columns of routers keep their moments; each domain is read on where the
      mixture stopped, and a new one from its beginning. The moments of new experts, and of routers
      that are set again, are zero under Adam's common count, which is large by then and corrects no
      bias. So the first update of such a weight is (1 - b1) / sqrt(1 - b2) of the learning rate,
      whatever its gradient: 0.45 at the default 0.9 and 0.95, where a new run begins with 1. While
      the gradient stays the same, the n-th update is (1 - b1^n) / sqrt(1 - b2^n): it rises to 1.10
      at n = 20 and falls to 1. Whatever the gradients, none is above
      (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) = 1.17. (With b2 = 0.999 these are 3.2, 6.6 at
      n = 12, and 7.3: there a warmup is needed.)
  """
  return _edit(mixture, added=_names(run_names), allow=allow, routers=routers, state=state)


def replace(mixture: str, pairs: tuple[tuple[str, str], ...], allow: tuple[str, ...] = (),
            routers: ConfigDict | None = None, state: bool = False) -> ConfigDict:
  """Starts from a mixture with some experts replaced, each in its place; see extend.

  Args:
    mixture: the run to start from.
    pairs: (old, new) for each: an expert of the mixture, by the name of the run that it was made
      from, and the run that takes its place. The experts of a pretrained mixture are 'expert 0',
      'expert 1' and so on.
    allow, routers, state: as in extend.
  """
  return _edit(mixture, replaced=tuple(tuple(pair) for pair in pairs), allow=allow,
               routers=routers, state=state)


def drop(mixture: str, *expert_names: str, routers: ConfigDict | None = None,
         state: bool = False) -> ConfigDict:
  """Starts from a mixture without some of its experts; see extend.

  Args:
    mixture: the run to start from.
    expert_names: the experts to leave out, by the names that `replace` takes.
    routers, state: as in extend.
  """
  return _edit(mixture, dropped=_names(expert_names), routers=routers, state=state)


def _edit(mixture: str, added=(), replaced=(), dropped=(), allow=(), routers=None, state=False
          ) -> ConfigDict:
  new = dict.fromkeys([*added, *(name for pair in replaced for name in pair[1:])])
  return ConfigDict({'kind': EDIT, 'runs': (mixture, *new), 'added': added, 'replaced': replaced,
                     'dropped': dropped, 'allow': _names(allow), 'state': state,
                     'routers': routers or from_text(AS_BEFORE)})


def from_text(kind: str, rows: int = 64, ridge: float = 1e-3, temperature: float = 0.0,
              labels: tuple[tuple[str, str], ...] = ()) -> ConfigDict:
  """Routers, or an ensemble's selector, that are set from text in one pass, without training.

  Each layer's router is fitted to its true inputs, of text that has passed its own expert in all
  earlier layers. Where the experts share all other weights (FREEZE_ALL_BUT_EXPERTS), such routers
  can do without a finetune.

  Args:
    kind: 'ridge', a linear map fitted by ridge regression to tell the experts' texts apart
      (DUME, arXiv 2603.29765); 'mean', the mean input of each expert's text; 'normal', random; or
      '', of extend and replace only: kind, rows, ridge and temperature are as the mixture's were.
    rows: training rows of each domain that are read.
    ridge: lambda of the regression, in units of the mean square of a router input's entries.
    temperature: divides the logits, which have a deviation of 1; 0 chooses what gives the lowest
      loss on a fifth of the rows.
    labels: (run, domain) for experts that were not trained on a single domain here: a seed, or a
      pretrained model. Two experts may have the same domain; they then share it.
  """
  return ConfigDict({'kind': kind, 'rows': rows, 'ridge': ridge, 'temperature': temperature,
                     'labels': tuple(tuple(label) for label in labels)})


def tfidf(top: int = 1) -> ConfigDict:
  """An ensemble's selector as in Branch-Train-Merge: by the words of the text so far.

  The mean of the experts' next-token probabilities predicts a token. Their weights follow from how
  similar the text so far is, by tf-idf, to the text that each expert was trained on here. It is
  compared every 64 tokens; until the first time, all experts have the same weight. It needs
  pip install 'btx_jax[tfidf]'.

  Args:
    top: how many experts have a weight, the most similar ones; 0 is all.
  """
  return ConfigDict({'kind': TFIDF, 'top': top})


def posterior(top: int = 0) -> ConfigDict:
  """An ensemble's selector as in Branch-Train-Merge: by the likelihood of the text so far.

  The mean of the experts' next-token probabilities predicts a token. An expert's weight is
  proportional to the probability that it gave to the document so far, so all of them read all of
  it.

  Args:
    top: how many experts have a weight, the most probable ones; 0 is all. All are computed in any
      case.
  """
  return ConfigDict({'kind': POSTERIOR, 'top': top})


def ensemble(*run_names: str, selector: ConfigDict | None = None, reader: str = '',
             layers: int = 0, forget: float = 0.0, hysteresis: float = 0.0) -> ConfigDict:
  """Whole models beside each other, from which a selector predicts each token.

  A selector made by from_text chooses one of them: it is a linear map of the mean hidden state, in
  one of the models, of the document so far. The others, tfidf and posterior, average the models'
  probabilities. An ensemble is measured, and with a linear selector exported. It is not trained:
  train its experts instead.

  Args:
    run_names: the experts: dense models of one vocabulary, at least two.
    selector: from_text(...), without a temperature; tfidf(...); or posterior(...). None is
      from_text('ridge'). The arguments below are for from_text alone.
    reader: the run whose hidden states the selector reads; '' is the first expert. It need not be
      an expert.
    layers: how many of the reader's layers are computed; the selector reads what comes out of the
      last of them, after the final norm. 0 is all.
    forget: half-life in tokens of a hidden state in the mean; 0 keeps all of them equally. Shorter
      ones follow changes within a document sooner.
    hysteresis: how far the logit of another expert must lead before it takes over; logits have a
      deviation of 1. A switch costs the new expert a pass over the text so far.
  """
  return ConfigDict({'kind': ENSEMBLE, 'runs': _names(run_names), 'reader': reader,
                     'selector': selector or from_text('ridge'), 'layers': layers,
                     'forget': float(forget), 'hysteresis': float(hysteresis)})


def hugging_face(folder: str) -> ConfigDict:
  """Starts from a pretrained Llama, Mistral (without sliding window), Mixtral, Qwen2 or Qwen3.

  Its sizes come from the folder, whatever the section `model` says. How it is computed, and how
  its mixtures route, come from that section. It needs the tokenizer that it was trained with:
  config.tokenizer.path = folder. A run without domains and steps is the model itself, read from
  the folder.

  Args:
    folder: a directory with config.json and *.safetensors.
  """
  return ConfigDict({'kind': HUGGING_FACE, 'runs': (), 'folder': folder})


def _names(names) -> tuple[str, ...]:
  """Flattens one name, or nested lists of names, into one tuple."""
  if isinstance(names, str):
    return (names,)
  return tuple(name for group in names for name in _names(group))
