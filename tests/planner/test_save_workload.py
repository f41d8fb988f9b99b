"""`memwall simulate --save-workload`: the requests that were simulated, for the engine to replay."""

import numpy as np
import pytest

from planner.commands.options import WorkloadOptions, workload_from_options
from planner.workload import load_workload


def test_the_simulated_requests_are_saved(memwall, tmp_path):
    path = tmp_path / "requests.jsonl"
    load = ("--request-rate", 4, "--num-prompts", 20, "--isl", "uniform:100-200", "--osl", 8, "--seed", 3)
    prefix = ("--shared-prefix-tokens", 64)
    found = memwall("simulate", *load, *prefix, "--rate-scale", 2, "--max-requests", 15, "--save-workload", path)
    assert found.code in (0, 1), found.err
    options = WorkloadOptions(
        request_rate=4, num_prompts=20, isl="uniform:100-200", osl="8", seed=3, shared_prefix_tokens=64
    )
    expected = workload_from_options(options).scaled(2).head(15)
    saved = load_workload(path)
    assert len(saved) == 15
    np.testing.assert_allclose(saved.arrival_s, expected.arrival_s - expected.arrival_s[0], atol=1e-9)
    np.testing.assert_array_equal(saved.input_tokens, expected.input_tokens)
    np.testing.assert_array_equal(saved.output_tokens, expected.output_tokens)
    assert saved.prefix_block_tokens == expected.prefix_block_tokens
    shared = [ids[0] for ids in saved.prefix_block_hashes]
    assert len(set(shared)) == 1


@pytest.mark.parametrize(("name", "word"), [("requests.csv", ".jsonl"), ("no/such/folder.jsonl", "folder.jsonl")])
def test_a_file_that_cannot_be_written_is_refused_first(memwall, tmp_path, name, word):
    answer = tmp_path / "answer.json"
    found = memwall("simulate", "--num-prompts", 5, "--save-workload", tmp_path / name, "--output-file", answer)
    found.check_bad_input(word)
    assert not answer.exists()
