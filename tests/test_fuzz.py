"""Checkpoints with one thing broken at random."""

import fuzz


def test_a_broken_checkpoint_is_converted_as_transformers_loads_it_or_refused_in_one_line(tmp_path):
    outcomes, wrong = fuzz.run(120, seed=0, folder=tmp_path)
    assert wrong == []
    assert min(outcomes["converted"], outcomes["refused"]) >= 25
