"""A study of real processes that are killed; `python -m tests.chaos` is the long form."""

import random

from tests.chaos import kills
from tests.chaos.workplace import Workplace


def test_a_study_killed_at_random_moments_ends_like_an_undisturbed_one(tmp_path):
  workplace = Workplace(str(tmp_path))
  found = kills.disturb(workplace, 'short', str(tmp_path / 'killed'), random.Random(1), kills=[2])
  assert len(found['kills']) == 2
  assert found['problems'] == found['differences'] == []
