"""Small tasks of lm-evaluation-harness in files, one for each type of request."""

import json
import pathlib
import textwrap

CITIES = {'France': 'Paris', 'Germany': 'Berlin', 'Italy': 'Rome', 'Spain': 'Madrid',
          'Japan': 'Tokyo', 'Egypt': 'Cairo', 'Greece': 'Athens', 'Cuba': 'Havana'}
# Each has more than 64 tokens of most tokenizers, but for the first.
PROSE = ['It was late, and the last guests had gone home before the rain stopped.',
         'The committee met on Tuesday to discuss the budget. ' * 8 + 'Nobody came.',
         ''.join(f'On day {day} it rained for {day * 7 % 11} hours, and then it stopped.\n'
                 for day in range(20))]
NAMES = ('capitals', 'letters', 'capital_names', 'last_words', 'prose')

_HEAD = '''
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {data}.jsonl, test: {data}.jsonl}}
test_split: test
metadata: {{version: 1.0}}
'''
_TASKS = {
    'capitals': ('cities', '''
        output_type: multiple_choice
        training_split: train
        doc_to_text: "The capital of {{country}} is"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        metric_list:
        - {metric: acc, aggregation: mean, higher_is_better: true}
        - {metric: acc_norm, aggregation: mean, higher_is_better: true}
        '''),
    'letters': ('cities', '''
        output_type: multiple_choice
        training_split: train
        doc_to_text: "The capital of {{country}}?\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
        doc_to_choice: [A, B]
        doc_to_target: "{{1 if answer == 1 else 0}}"
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
        '''),
    'capital_names': ('cities', '''
        output_type: generate_until
        training_split: train
        doc_to_text: "The capital of {{country}} is"
        doc_to_target: "{{city}}"
        generation_kwargs: {until: [".", ",", "\\n"], max_gen_toks: 12}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
        filter_list:
        - {name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}
        '''),
    'last_words': ('prose', '''
        output_type: loglikelihood
        doc_to_text: "{{text[:-6]}}"
        doc_to_target: "{{text[-6:]}}"
        target_delimiter: ""
        metric_list:
        - {metric: acc, aggregation: mean, higher_is_better: true}
        - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
        '''),
    'prose': ('prose', '''
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list:
        - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
        - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
        '''),
}


def write(folder: pathlib.Path) -> str:
  """Writes the tasks and their data into a folder; returns its path."""
  folder.mkdir(exist_ok=True)
  cities, documents = list(CITIES.values()), []
  for i, (country, city) in enumerate(CITIES.items()):
    choices = [city, cities[i - 1], cities[i - 2]]
    choices = choices[i % 3:] + choices[:i % 3]
    documents.append({'country': country, 'city': city, 'choices': choices,
                      'answer': choices.index(city)})
  for name, lines in (('cities', documents), ('prose', [{'text': text} for text in PROSE])):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  for name, (data, task) in _TASKS.items():
    (folder / f'{name}.yaml').write_text(
        _HEAD.format(name=name, data=data) + textwrap.dedent(task))
  return str(folder)
