"""The flags of the command line. The help of each names the commands it is for."""

from absl import flags
from ml_collections import config_flags

from btx_jax.data import domains
from btx_jax.devices import distributed
from btx_jax.generation.settings import Sampling

CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config: a file, like mine.py, or a recipe, like demo or demo:full.',
    lock_config=True)
WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of checkpoints, tokens and the report; default runs/CONFIG_NAME.')
RUN = flags.DEFINE_string('run', None, 'The name of a run: train only this one, as its own job.')
PROFILE = flags.DEFINE_integer(
    'profile', 0, 'Number of steps of each run to trace, for xprof and Perfetto.', lower_bound=0)
WATCH = flags.DEFINE_bool('watch', False, 'status: repeat every two seconds, until Ctrl-C.')
CHECK = flags.DEFINE_bool(
    'check', False, 'status: read all kept checkpoints, and show which are sound.')
BASELINE = flags.DEFINE_string(
    'baseline', '', 'report, wall_time: the model that the others are compared with; default the '
    'first, for wall_time the first that all machines train together.')
LATEX = flags.DEFINE_bool(
    'latex', False, 'report: print the table for LaTeX (package booktabs), and write nothing.')
MACHINES = flags.DEFINE_integer(
    'machines', None, 'wall_time: the number of machines; ledger: those of each run that is not '
    'trained apart and has no train.workers; default 4.', lower_bound=1)
JSON = flags.DEFINE_bool(
    'json', False, 'status, ledger, evaluate, generate, preflight, wall_time: print JSON.')
TOPOLOGY = flags.DEFINE_string(
    'topology', None,
    'preflight: the devices to compile for, such as v5p:4x4x4, v5e:16x16*2, h100:8 or cpu:8.')
MEASURED = flags.DEFINE_string(
    'measured', None, 'preflight: a file of steps that were timed on the same chips '
    '(tests/benchmarks/accelerator.py writes it), for a forecast beside the bound.')
LINKS = flags.DEFINE_list(
    'links', ['1', '10', '100'], 'wall_time: Gbit/s that each machine can send and receive.')
ON = flags.DEFINE_multi_string(
    'on', [], 'evaluate: a directory, glob or file to score; may be given several times.')
MODEL = flags.DEFINE_string(
    'model', None, 'evaluate, generate: the folder of a pretrained model, in place of a run.')
TEXT_FIELD = flags.DEFINE_string(
    'text_field', 'text', 'evaluate: the JSON field or Parquet column with the text.')
FORMAT = flags.DEFINE_enum(
    'format', 'text', domains.FORMATS,
    'evaluate: what the records of --on are: texts, conversations or pairs.')
SEPARATOR = flags.DEFINE_string(
    'separator', '', 'evaluate: splits a plain text file into documents.')
LENGTH = flags.DEFINE_integer(
    'length', 0, 'evaluate: tokens per window; 0 means data.seq_len, or without a config the '
    'context length of the model, up to 2,048.', lower_bound=0)
STRIDE = flags.DEFINE_integer(
    'stride', None, 'evaluate: tokens from one window to the next; default evaluation.stride.',
    lower_bound=0)
TASKS = flags.DEFINE_list(
    'tasks', [], 'evaluate: built-in tasks (see evaluation.tasks) and tasks of '
    'lm-evaluation-harness, as in code,arc_easy,gsm8k:8 (the last with 8 shots); the default is '
    'the harness\'s tasks in evaluation.tasks.')
INCLUDE_PATH = flags.DEFINE_string(
    'include_path', '', 'evaluate: a directory with your own tasks, as YAML files.')
SHOTS = flags.DEFINE_integer(
    'shots', None, 'evaluate: the number of examples before each question, for tasks named without '
    'a number.',
    lower_bound=0)
LIMIT = flags.DEFINE_integer(
    'limit', None, 'evaluate: the most documents to score of each task.', lower_bound=1)
DOWNLOAD = flags.DEFINE_bool(
    'download', False, 'evaluate: download data sets of tasks that are not on this machine.')
RUN_CODE = flags.DEFINE_bool(
    'run_code', False, 'evaluate: run the code that the model writes, for tasks that test it.')
PROMPT = flags.DEFINE_multi_string(
    'prompt', [], 'generate: the text to continue; may be given several times. Without one, each '
    'line of the standard input is a prompt.')
PROMPTS = flags.DEFINE_string(
    'prompts', '', 'generate: a file with one prompt per line. In a .jsonl file, a line is an '
    'object with the field prompt, a string, or messages, a conversation to answer.')
CHAT = flags.DEFINE_bool(
    'chat', False, "generate: each prompt is a user's turn, which the model answers; without "
    'prompts, the lines of standard input are the turns of one conversation.')
SYSTEM = flags.DEFINE_string('system', '', 'generate --chat: the system message.')
CHAT_TEMPLATE = flags.DEFINE_string(
    'chat_template', '', 'generate: the name of a chat template, chatml or llama3; the default is '
    "the tokenizer's own.")
STEP = flags.DEFINE_integer(
    'step', 0, 'generate: the step of --run to generate with; 0 is its end.', lower_bound=0)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    'max_new_tokens', 256, 'generate: the most tokens to generate per text.')
TEMPERATURE = flags.DEFINE_float(
    'temperature', Sampling.temperature,
    'generate: divides the logits; 0 takes the likeliest token.')
TOP_K = flags.DEFINE_integer(
    'top_k', Sampling.top_k, 'generate: sample from this many likeliest tokens; 0 is all.')
TOP_P = flags.DEFINE_float(
    'top_p', Sampling.top_p,
    'generate: sample from the fewest likeliest tokens with this total probability.')
MIN_P = flags.DEFINE_float(
    'min_p', Sampling.min_p,
    'generate: sample from tokens at least this many times as likely as the likeliest.')
REPETITION_PENALTY = flags.DEFINE_float(
    'repetition_penalty', Sampling.repetition_penalty,
    'generate: makes tokens that are already in the text less likely; 1 is no penalty.')
STOP = flags.DEFINE_multi_string(
    'stop', [], 'generate: a string that ends a text; may be given several times.')
SEED = flags.DEFINE_integer('seed', 0, 'generate: the random seed.')
N = flags.DEFINE_integer('n', 1, 'generate: texts to generate for each prompt.', lower_bound=1)
EXPERTS = flags.DEFINE_bool(
    'experts', False, 'generate: colour each token by the expert with the largest gate, or in an '
    'ensemble with the largest weight.')
TO = flags.DEFINE_string('to', None, 'export: the folder to write.')
DTYPE = flags.DEFINE_string(
    'dtype', '', 'export, generate: the type of the weights, bfloat16 or float32; the default is '
    "bfloat16 for export, and the model's own for generate.")
DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'This is one of several processes, and jax finds the others itself: on '
    'TPU VMs, GKE and Slurm. See docs/processes.md.')
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, for several processes started by hand.')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes the job has.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'The number of this process, from 0.')
COORDINATOR_TIMEOUT = flags.DEFINE_float(
    'coordinator_timeout', distributed.TIMEOUT,
    'Seconds to wait at the start until all processes are connected.', lower_bound=1)
DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')
