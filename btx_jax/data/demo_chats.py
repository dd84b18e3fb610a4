"""Makes conversations for configs/chat.py, about countries and arithmetic; downloads nothing.

  python -m btx_jax.data.demo_chats FOLDER

writes countries.jsonl and arithmetic.jsonl into the folder, and countries.test.jsonl and
arithmetic.test.jsonl with other countries and problems. Each line is a conversation of three
questions. Most answers are a word or a number. The countries are those of the CIA World Factbook:
pip install 'btx_jax[demo]'.
"""

from collections.abc import Iterable, Iterator, Mapping
import json
import os
import random
import sys
from typing import Any

from btx_jax.data import demo
from btx_jax.files.writing import replacing

_QUESTIONS = (  # about a country, and where the factbook has the answer
    ('What is the capital of {}?', ('Government', 'Capital', 'name')),
    ('In which region of the world is {}?', ('Geography', 'Map references')),
    ('What is the internet code of {}?', ('Communications', 'Internet country code')),
    ('What adjective belongs to {}?', ('People and Society', 'Nationality', 'adjective')),
)
_ASKED = 3  # questions per conversation
_LONGEST = 30  # characters of the longest answer
_TEST = 8  # every eighth conversation is a test
_PROBLEMS, _FACTORS = 320, (2, 12)

Conversation = list[dict[str, str]]


def countries() -> Iterator[Conversation]:
  """A conversation about each country, which asks three of four questions in any order."""
  rng = random.Random('countries')
  for _, country in demo.countries():
    name = _answer(country, ('Government', 'Country name', 'conventional short form'))
    found = [(question.format(name), answer) for question, where in _QUESTIONS
             if (answer := _answer(country, where))]
    if name and len(found) >= _ASKED:
      yield _conversation(rng.sample(found, _ASKED))


def arithmetic() -> Iterator[Conversation]:
  """Conversations of three problems; no problem occurs twice."""
  rng, asked, chosen = random.Random('chats'), set(), []
  while len(asked) < _PROBLEMS * _ASKED:
    question, answer = demo.problem(rng.randint, *_FACTORS)
    if question in asked:
      continue
    asked.add(question)
    chosen.append((question, answer))
    if len(chosen) == _ASKED:
      yield _conversation(chosen)
      chosen = []


def write(folder: str) -> None:
  """Writes the files; see the top of this file."""
  for name, made in (('countries', countries()), ('arithmetic', arithmetic())):
    conversations = list(made)
    test = conversations[::_TEST]
    train = [each for i, each in enumerate(conversations) if i % _TEST]
    for ending, chosen in (('', train), ('.test', test)):
      path = os.path.join(folder, f'{name}{ending}.jsonl')
      with replacing(path) as file:
        file.writelines(json.dumps({'messages': each}, ensure_ascii=False) + '\n'
                        for each in chosen)
      print(f'{path}: {len(chosen):,} conversations')


def _conversation(turns: Iterable[tuple[str, str]]) -> Conversation:
  return [{'role': role, 'content': text}
          for turn in turns for role, text in zip(('user', 'assistant'), turn)]


def _answer(country: Mapping[str, Any], where: tuple[str, ...]) -> str:
  """A short entry of the factbook; '' if there is none."""
  found: Any = country
  for key in (*where, 'text'):
    found = found.get(key, {}) if isinstance(found, Mapping) else {}
  text = demo.plain(found) if isinstance(found, str) else ''
  return '' if text == 'none' or len(text) > _LONGEST else text


if __name__ == '__main__':
  write(sys.argv[1])
