"""A pretrained model branched, mixed and exported again: SmolLM2-135M on the demo's text.

The seed is read from a Hugging Face folder. Three experts are trained briefly on code, math and
facts, mixed with the seed, and finetuned. `export` writes a Mixtral that transformers loads.
This is so short that it shows the path and not the method: for real use, give it your own text, a
thousand times the steps, and an accelerator. About half an hour and 16 GB on two CPU cores;
docs/pretrained.md has the results. Also compiled for v5e:2x2.

  python -m btx_jax.main --config=configs/smollm2_135m.py:/models/SmolLM2-135M
  python -m btx_jax.main --config=configs/smollm2_135m.py:/models/SmolLM2-135M --run=btx \
      export --to=/models/btx
"""

from btx_jax import base
from btx_jax.configs import demo


def get_config(folder: str = '/models/SmolLM2-135M'):
  config = demo.get_config()
  config.tokenizer.path = folder
  config.domains = {name: config.domains[name] for name in demo.SPECIALISTS}
  config.data.seq_len = 256
  # As in the folder, which preflight does not need.
  config.model = base.get_config().model
  config.model.update(vocab_size=49_152, dim=576, ffn_dim=1536, num_layers=30, num_heads=9,
                      num_kv_heads=3, tied_head=True)
  config.train.batch_size = 4
  config.evaluation.update(tokens=4096, batch_size=8)
  config.checkpoints_kept = 1
  config.checkpoint_every = 100
  config.checks.expert_gain = 0.0
  experts = tuple(f'expert/{domain}' for domain in demo.SPECIALISTS)
  short = {'optimizer': {'peak_lr': 2e-4, 'warmup': 0.2}, 'steps': 16}
  config.runs = {
      'seed': base.run(base.hugging_face(folder)),
      **{f'expert/{domain}': base.run(base.checkpoint('seed'), {domain: 1}, **short)
         for domain in demo.SPECIALISTS},
      'btx': base.run(base.mix('seed', *experts), dict.fromkeys(demo.SPECIALISTS, 1), **short),
  }
  return config
