"""The paper's tasks with the paper's shots (table 1): twelve tasks of lm-evaluation-harness 0.4.13.

Text is generated greedily. All documents of all tasks take hours on a GPU and days on a CPU;
--limit=100 scores the first hundred documents of each. The data sets must be on this machine, or
--download fetches them. HumanEval and MBPP run the code that the model writes, so they need
--run_code; MATH needs pip install 'lm-eval[math]'. See docs/evaluate.md.

  python -m btx_jax.main --config=configs/eval_paper.py:/models/mine evaluate --run=model --run_code

In a config of your own: config.evaluation.tasks = eval_paper.TASKS, after
from btx_jax.configs import eval_paper.
"""

from btx_jax import base

# The harness's prompts are not always those of the paper, which follows Touvron et al. (2023) and
# Roziere et al. (2023). Compare models that were measured in the same way, not with its figures.
TASKS = (
    'gsm8k_cot:8', 'minerva_math:4',  # math: exact match
    'humaneval:0', 'mbpp:3',  # code: pass@1
    'nq_open:5', 'triviaqa:5',  # knowledge: exact match
    # reasoning: accuracy
    'arc_easy:0', 'arc_challenge:0', 'social_iqa:0', 'piqa:0', 'winogrande:0',
    'mmlu:5',  # general: accuracy
)


def get_config(folder: str = '/models/Llama-2-7b-hf'):
  config = base.get_config()
  config.tokenizer.path = folder
  config.evaluation.tasks = TASKS
  config.runs = {'model': base.run(base.hugging_face(folder))}
  return config
