"""Counts the questions in conversations that a model answers exactly, and prints some answers.

  python -m tests.benchmarks.answers FOLDER chats.jsonl ...

FOLDER is a model in Hugging Face's format with its tokenizer and chat template, like one that
`export` wrote. Each answer is generated greedily, after the true answers before it, and ends at the
folder's own stop tokens.
"""

import json
import sys

import btx_jax
from btx_jax.data import chat_tokens, chats, tokenizer

SHOWN = 6  # questions of each file


def main(folder: str, *paths: str) -> None:
  found = tokenizer.load(folder)
  write = btx_jax.Generator(*btx_jax.load(folder), folder, [chat_tokens.stop_id(found)])
  for path in paths:
    with open(path, encoding='utf-8') as file:
      conversations = [chats.messages(json.loads(line)) for line in file]
    asked = [(talk[:i], each['content']) for talk in conversations
             for i, each in enumerate(talk) if each['role'] == chats.ASSISTANT]
    texts = write([chat_tokens.prompt_ids(found, before) for before, _ in asked], 32)
    given = [text.text.strip() for (text,) in texts]
    exact = sum(text == answer for text, (_, answer) in zip(given, asked))
    print(f'{path}: {exact} of {len(asked)} answers are exact')
    for (before, answer), text in list(zip(asked, given))[:SHOWN]:
      wanted = '' if text == answer else f', not {answer!r}'
      print(f'  {before[-1]["content"]}\n    {text!r}{wanted}')


if __name__ == '__main__':
  main(*sys.argv[1:])
