"""Every field of a config, once. The other configs start from this one."""

from ml_collections import ConfigDict

# For a run's train={'freeze': ...}.
FREEZE_EXPERTS = ('/experts/',)
FREEZE_ALL_BUT_ROUTER = ('^(?!.*/router)',)  # with the bias that it may have


def get_config() -> ConfigDict:
  """The defaults; `domains` and `runs` are what a config has to add."""
  config = ConfigDict()
  # Everything random follows from it and from the name of the run.
  config.seed = 0

  # The text: name -> domain(...), see below.
  config.domains = ConfigDict()

  # How text becomes tokens.
  config.tokenizer = ConfigDict({
      # A sentencepiece model, a tokenizer.json (pip install 'btx_jax[hf]'), or a folder with
      # either; empty: a sentencepiece model is trained from the text of all domains.
      'path': '',
      # Pieces of a trained one.
      'vocab_size': 32_000,
      # Characters of each domain that it is trained on.
      'sample_chars': 2_000_000,
  })

  # How tokens become rows to train on, and what is held out.
  config.data = ConfigDict({
      # Tokens of a row.
      'seq_len': 1024,
      # Share of the documents that are kept from training.
      'held_out': 0.02,
      # Share of a domain's records (lines, rows, files) that may be unusable: they are skipped
      # and counted. More is an error.
      'max_skipped': 0.1,
  })

  # Sizes of the model, and how it is computed; see btx_jax/model/config.py.
  config.model = ConfigDict({
      # Rows of the embedding; 0 is the tokenizer's number of pieces.
      'vocab_size': 0,
      # Width of the residual stream.
      'dim': 512,
      # Width of the SwiGLU hidden layer, of each expert too.
      'ffn_dim': 1408,
      # Transformer blocks.
      'num_layers': 8,
      # Query heads of a layer.
      'num_heads': 8,
      # Key-value heads; fewer than num_heads is grouped-query attention.
      'num_kv_heads': 8,
      # Width of a head; 0 is dim / num_heads.
      'head_dim': 0,
      # Base of the rotary frequencies.
      'rope_theta': 10_000.0,
      # Llama-3 scaling of the rotary frequencies: how much longer the context became; 1 is none.
      'rope_factor': 1.0,
      # Waves longer than rope_original_length / this are scaled in full.
      'rope_low_freq_factor': 1.0,
      # Waves shorter than rope_original_length / this stay as they are.
      'rope_high_freq_factor': 4.0,
      # Context length before the scaling.
      'rope_original_length': 8192,
      # Epsilon of RMSNorm.
      'norm_eps': 1e-5,
      # The output head is the embedding, transposed.
      'tied_head': False,
      # How the tokens of a mixture choose experts: 'top_k', the paper's; 'softmax_top_k', softmax
      # over all before, so that one expert a token can be learned; 'switch', that with one expert
      # and limited room; 'soft', all experts; 'sample_top_1', one drawn at random in training;
      # 'hash', by the token's id. See btx_jax/model/routers.py.
      'router': 'top_k',
      # Experts per token; 0 is what the router has: 2, or 1 of 'switch' and 'sample_top_1', or all
      # of 'soft'.
      'top_k': 0,
      # Of 'switch': tokens that an expert has room for in training, in units of a balanced load;
      # the rest is dropped. 0 is 1.5.
      'capacity_factor': 0.0,
      # 'float32' or 'bfloat16': of the computation; parameters are float32.
      'dtype': 'float32',
      # What of each layer is kept for the backward pass; the rest is recomputed. From most memory
      # to least: 'none' recomputes nothing; 'matmuls' keeps their results; 'projections', those
      # outside the feed-forward layers; 'dispatch', what attention gives, and tokens sent to
      # experts; 'attention', the first alone; 'full', only the layer's input; 'offload',
      # that in the host's memory.
      'remat': 'none',
      # 'xla', anywhere; 'splash', on a TPU; 'cudnn', on an NVIDIA GPU in bfloat16; 'auto', the
      # one for the platform.
      'attention': 'auto',
      # How tokens get to experts and back, a matter of speed: in buffers of fixed size, of which
      # what is in use is multiplied piece by piece ('pieces', for CPU and GPU) or in one grouped
      # matmul ('grouped', for TPU); 'gather', all tokens to all; or 'auto', the platform's own.
      'dispatch': 'auto',
      # Room of an expert in one round of dispatch; a matter of speed, nothing is dropped.
      'dispatch_factor': 1.25,
  })

  # AdamW as in the paper (4.1.2), see btx_jax/training/optim.py.
  config.optimizer = ConfigDict({
      # Learning rate after the warmup.
      'peak_lr': 1e-4,
      # Share of the steps during which the learning rate rises from 0.
      'warmup': 0.05,
      # Learning rate at the end of the cosine, as a share of the peak.
      'final_lr': 0.1,
      # Adam's decay of the mean of gradients.
      'b1': 0.9,
      # Adam's decay of the mean of squared gradients.
      'b2': 0.95,
      # Adam's epsilon.
      'eps': 1e-8,
      # Decoupled weight decay, times the learning rate; not on norm scales.
      'weight_decay': 0.1,
      # Largest norm of the whole gradient; a longer one is scaled down to it.
      'clip_norm': 1.0,
  })

  # What a step is.
  config.train = ConfigDict({
      # Rows of a step, over all devices and microbatches.
      'batch_size': 32,
      # Microbatches of a step.
      'microbatches': 1,
      # Weight of the load-balancing loss of a mixture (paper 3.3).
      'balance_loss': 0.01,
      # 'microbatch', or 'batch': exact across microbatches, for one more forward pass.
      'balance_scope': 'microbatch',
      # Weight of the router z-loss, which keeps the logits of a mixture's routers small; 0 is none.
      'router_z': 0.0,
      # Balances without a loss: each step, the bias that an expert has when it is chosen changes by
      # this, towards an even load (arXiv 2408.15664 has 0.001). 0 is no bias.
      'balance_bias': 0.0,
      # Regular expressions: parameters whose path one of them is found in stay as they are.
      # FREEZE_EXPERTS and FREEZE_ALL_BUT_ROUTER, above, are two such lists for mixtures.
      'freeze': (),
  })

  # How models become a mixture.
  config.mix = ConfigDict({
      # Standard deviation of the routers that mixing adds.
      'router_std': 0.02,
      # Memory for an export, in GB (10**9 bytes), beyond the 0.3 or so that Python and jax take:
      # it works on pieces of a tensor that fit.
      'ram_gb': 4.0,
  })

  # Names of runs that are trained as one program, side by side, each on its slice of
  # mesh.expert; () trains one after the other. Only domains, steps and learning rates may differ.
  # What comes out is the same.
  config.stacked = ()

  # Devices along each axis; -1 takes all that are left, 0 is chosen: of `expert` as many as divide
  # the experts of the largest mixture, of `fsdp` as many as it takes to fit into the memory.
  config.mesh = ConfigDict({
      # Copies of the model.
      'data': -1,
      # Parameters and optimizer state are cut up, and gathered when they are used.
      'fsdp': 0,
      # Each device has experts of its own; elsewhere this axis acts as `fsdp`.
      'expert': 0,
      # Heads, feed-forward width and vocabulary are cut up, and computed on in parts: for
      # devices with a fast connection. Rows are shared among the other axes only.
      'tensor': 1,
  })

  # Bits per byte on held-out text.
  config.evaluation = ConfigDict({
      # Steps between measurements while a run goes on; 0 is none. The table is measured at the
      # end anyway.
      'every': 0,
      # Held-out tokens of each domain, in whole documents (at least one).
      'tokens': 65_536,
      # Rows at a time.
      'batch_size': 32,
      # Branch-Train-Merge, to compare with: the experts of each mixture, unmixed, averaging what
      # they give to a token. By how like the text so far is to what each was trained on (tf-idf;
      # pip install 'btx_jax[merge]'): 'top_1', 'top_2' or 'all' speak; or 'posterior', by how
      # likely each found it. () is none.
      'merge': (),
  })

  # Steps between lines of metrics.jsonl.
  config.log_every = 10
  # Steps between checkpoints; the end of a run is always saved.
  config.checkpoint_every = 500
  # Also write events for TensorBoard, into the directory of each run.
  config.tensorboard = False
  # Checkpoints of a run that are kept, the newest.
  config.checkpoints_kept = 2

  # What the checks under the table ask for, in bits per byte.
  config.checks = ConfigDict({
      # How much an expert beats the seed on its own domain by.
      'expert_gain': 0.0,
      # How much worse than the seed the mixture may be on a domain without an expert.
      'seed_slack': 0.01,
      # How much worse than an expert the mixture may be on that one's domain.
      'specialist_gap': 0.05,
  })

  # The runs: name -> run(...), see below.
  config.runs = ConfigDict()

  config.lock()  # a field that is misspelt is an error
  config.domains.unlock()
  config.runs.unlock()
  return config


def domain(paths=(), text_field: str = 'text', separator: str = '',
           source: str = 'files', id_field: str = '') -> ConfigDict:
  """Text of one kind.

  Args:
    paths: directories, globs or files: .jsonl, .parquet (pip install 'btx_jax[parquet]'),
      .arrayrecord or .array_record; all others are plain text. It and .jsonl may be .gz.
    text_field: the field or column of the text. '': the records of an ArrayRecord file are
      text themselves, not JSON.
    separator: cuts a plain text file into documents; '' leaves it one document.
    source: 'files', or text that Python packages carry (btx_jax/data/demo.py).
    id_field: the field or column of the document's id, kept beside the tokens; '' is none.
  """
  paths = (paths,) if isinstance(paths, str) else tuple(paths)
  return ConfigDict({'source': source, 'paths': paths, 'text_field': text_field,
                     'separator': separator, 'id_field': id_field})


def run(init: ConfigDict, domains: dict[str, float] | None = None, steps: int = 0,
        match_flops_of: tuple[str, ...] = (), model: dict | None = None,
        optimizer: dict | None = None, train: dict | None = None) -> ConfigDict:
  """One training run. Without domains and steps it is what it starts from, and takes no room.

  Args:
    init: random(), checkpoint(RUN), mix(RUNS) or hugging_face(FOLDER).
    domains: weight of each domain in the rows; they need not add up to 1.
    steps: of the optimizer.
    match_flops_of: instead of `steps`: as many as spend the FLOPs of these runs.
    model, optimizer, train: what this run has otherwise than the sections of that name.
  """
  return ConfigDict({
      'init': init, 'domains': {name: float(weight) for name, weight in (domains or {}).items()},
      'steps': steps, 'match_flops_of': _names(match_flops_of), 'model': model or {},
      'optimizer': optimizer or {}, 'train': train or {}})


def random() -> ConfigDict:
  """Starts from random parameters."""
  return ConfigDict({'kind': 'random', 'runs': ()})


def checkpoint(run_name: str) -> ConfigDict:
  """Starts where another run ended: branching a seed, or continuing one.

  Args:
    run_name: of the run that it starts from.
  """
  return ConfigDict({'kind': 'checkpoint', 'runs': (run_name,)})


def mix(*run_names: str, averaged: tuple[str, ...] = (), rules: dict[str, str] | None = None,
        arrangement: str = 'whole', chunks: int = 1,
        allow: tuple[str, ...] = ()) -> ConfigDict:
  """Starts from a mixture of these runs' models; naming one several times upcycles it.

  Args:
    run_names: of the runs that become the experts, in their order; a list is fine too.
    averaged: the runs whose mean all but the feed-forward layers becomes, each once; () is those
      of the experts. So a model can be averaged and have no expert, or the reverse.
    rules: other than the mean, for parameters in whose path (attn/q, embed, norm/scale ...) a
      regular expression is found, the first that is: 'tokens', the mean weighted by what each run
      was trained on since they parted, or the name of a run, whose parameter it becomes.
    arrangement: 'whole', each run is an expert (paper 3.2). 'split', each becomes `chunks`
      experts, whose outputs count `chunks` times and whose routers start equal: where
      model.top_k is a multiple of `chunks` and the router 'top_k', the mixture starts as the
      unsplit one with top_k / chunks does, exactly; else of the same expected size.
      'plain_split', the same without both: the paper's form (3.3), whose outputs start
      `chunks` times too small. 'blend', expert n has the n-th part of every run (paper 3.3);
      nothing is exact at its start.
    chunks: pieces of a run that is split.
    allow: in what the runs may differ, which is refused otherwise: 'rope' (rotary settings),
      'norm_eps', 'vocabulary', 'seed' (they were not trained from one). Of the first three, the
      mixture has what the first run that is averaged has. Rows of embedding and head are matched
      by the token's name: tokens that a run lacks have the first one's row, tokens that only
      others have are dropped.
  """
  return ConfigDict({'kind': 'mix', 'runs': _names(run_names), 'averaged': _names(averaged),
                     'rules': tuple((rules or {}).items()), 'arrangement': arrangement,
                     'chunks': chunks, 'allow': _names(allow)})


def hugging_face(folder: str) -> ConfigDict:
  """Starts from a pretrained Llama, Mistral (without sliding window) or Mixtral.

  Its sizes are those of the folder, whatever the section `model` says of them; how it is
  computed, and what its mixtures are like, is as that section says. It needs the tokenizer that
  it was trained with: config.tokenizer.path = folder. A run without domains and steps is the
  model as it is, read from where it lies.

  Args:
    folder: with config.json and *.safetensors.
  """
  return ConfigDict({'kind': 'hugging_face', 'runs': (), 'folder': folder})


def _names(names) -> tuple[str, ...]:
  """One name, or names in lists, as one tuple."""
  if isinstance(names, str):
    return (names,)
  return tuple(name for group in names for name in _names(group))
