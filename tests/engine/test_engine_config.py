"""What an engine may be told: every value that it cannot take is a sentence, whatever its type."""

from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import UserError
from engine.scheduling import SchedulerConfig

BOOLEANS = ("enable_prefix_caching", "enable_chunked_prefill", "enforce_eager", "async_scheduling")
BAD = [
    ("model", "", "a folder"),
    ("model", " ", "a folder"),
    ("model", None, "a folder"),
    ("model", 5, "a folder"),
    ("model", ["tiny"], "a folder"),
    ("model", "a\0b", "a folder"),
    ("dtype", 5, "one of auto, bfloat16"),
    ("dtype", None, "one of auto, bfloat16"),
    ("kv_cache_dtype", ["fp8"], "one of auto"),
    ("quantization", "int8", "one of fp8"),
    ("device", np.zeros(2), "one of auto, cuda, cpu"),
    ("gpu_memory_utilization", "x", "a number, above 0 and at most 1"),
    ("gpu_memory_utilization", "0.9", "a number"),
    ("gpu_memory_utilization", None, "a number"),
    ("gpu_memory_utilization", float("nan"), "a number"),
    ("gpu_memory_utilization", 10**400, "a number"),
    ("gpu_memory_utilization", 1.5, "above 0 and at most 1"),
    ("kv_cache_dtype_skip_layers", 5, "a list of layers"),
    ("kv_cache_dtype_skip_layers", None, "a list of layers"),
    ("kv_cache_dtype_skip_layers", "1", "a list of layers"),
    ("kv_cache_dtype_skip_layers", [1.0], "whole numbers from 0"),
    ("kv_cache_dtype_skip_layers", [True], "whole numbers from 0"),
    ("block_size", 64.0, "one of 32, 64, 128 as a whole number"),
    ("block_size", "64", "one of 32, 64, 128"),
    ("block_size", None, "one of 32, 64, 128"),
    ("block_size", 48, "one of 32, 64, 128"),
    ("seed", 2**63, "at most 9223372036854775807"),
    ("seed", 10**23, "at most"),
    ("seed", -1, "at least 0"),
    ("seed", None, "a whole number"),
    ("max_num_seqs", 2**20 - 1, "at most 1048574"),
    ("max_num_seqs", 10**20, "at most 1048574"),
    ("max_num_seqs", True, "a whole number"),
    ("max_num_batched_tokens", 2**24 + 1, "at most 16777216"),
    ("max_num_batched_tokens", 8192.0, "a whole number"),
    ("num_gpu_blocks_override", 10**20, "at most 2147483647"),
    ("num_gpu_blocks_override", 1, "at least 2"),
    ("max_model_len", 10**20, "at most 2147483647"),
    *[(name, value, "True or False") for name in BOOLEANS for value in ("no", 0, None)],
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_values_that_are_refused(name, value, words):
    with pytest.raises(UserError) as caught:
        EngineConfig(**{"model": "tiny", name: value})
    for word in (f"{name} {'has' if isinstance(value, list) and name.startswith('kv_cache_dtype_') else 'is'} ", words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_that_python_does_not_print():
    with pytest.raises(UserError, match="seed is a number of thousands of digits; it must be a whole number of"):
        EngineConfig("tiny", seed=10**5000)


def test_integers_and_paths_of_any_kind_become_pythons_own():
    config = EngineConfig(
        model=Path("folder"),
        block_size=np.int64(32),
        max_num_seqs=np.int32(7),
        seed=np.uint64(2**63 - 1),
        gpu_memory_utilization=np.float32(0.5),
        kv_cache_dtype_skip_layers=np.array([0, 3]),
    )
    plain = EngineConfig("folder", "auto", "auto", None, "auto", (0, 3), None, 7, 8192, 0.5, 32, seed=2**63 - 1)
    assert config == plain
    values = (config.model, config.block_size, config.seed, config.kv_cache_dtype_skip_layers[0])
    assert [type(value) for value in values] == [str, int, int, int]


def test_the_greatest_values_are_taken():
    config = EngineConfig(
        "tiny",
        max_num_seqs=2**20 - 2,
        max_num_batched_tokens=2**24,
        num_gpu_blocks_override=2**31 - 1,
        max_model_len=2**31 - 1,
    )
    SchedulerConfig(config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len)  # would raise


def test_options_by_name():
    assert EngineConfig.from_options("tiny", {"seed": 3}) == EngineConfig("tiny", seed=3)
    for name, hint in (("max_seqs", "did you mean max_num_seqs?"), ("max-model-len", "did you mean max_model_len?")):
        with pytest.raises(UserError, match="no option") as caught:
            EngineConfig.from_options("tiny", {name: 1})
        assert hint in str(caught.value)
