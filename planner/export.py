"""From a plan to the command that launches it. Exporters read only the plan's JSON."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

from planner.basis import Basis
from planner.errors import UserError, unknown_name
from planner.plan_report import Plan, read_plan
from planner.records import DeploymentRecord
from planner.step_time import Evidence

TARGETS = ("vllm",)

_VLLM_VERSION = "0.33"
_VLLM_KV_DTYPES = {
    "bfloat16": "auto",
    "fp8": "fp8",
    "int8": "int8_per_token_head",
    "int4": "int4_per_token_head",
}
_REMARK_WIDTH = 100
_NGRAM_LOOKUP = {"prompt_lookup_min": 2, "prompt_lookup_max": 5}


def choose_plan(path: Path, rank: int = 1) -> Plan:
    """One of the ranked plans in what `memwall plan --output json` wrote.

    Args:
        path: the file.
        rank: 1 for the best.

    Raises:
        UserError: not such a file, or it has no plan of this rank.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one with `memwall plan --output-file {path.name}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    plans = read_plan(text, str(path)).plans
    if not plans:
        raise UserError(f"{path}: no plan in it is feasible, so there is nothing to export")
    if not 1 <= rank <= len(plans):
        raise UserError(f"--rank is {rank}; {path} has the ranks 1 to {len(plans)}")
    return plans[rank - 1]


def export_plan(plan: Plan, target: str) -> str:
    """The launch file for a target, ending in a newline.

    Raises:
        UserError: an unknown target, or a setting that the target lacks.
    """
    if target not in TARGETS:
        raise unknown_name("export target", target, TARGETS, f"--target takes {', '.join(TARGETS)}")
    return vllm_script(plan)


def vllm_script(plan: Plan) -> str:
    """A shell script that starts one replica with `vllm serve`.

    Raises:
        UserError: vLLM cannot serve this.
    """
    deployment = plan.deployment
    command = f"vllm serve {shlex.quote(deployment.hf_repo or deployment.model)}"
    lines = [command, *(shlex.join(flag) for flag in vllm_flags(deployment))]
    return "\n".join(["#!/bin/sh", *(f"# {line}" for line in _remarks(plan)), " \\\n  ".join(lines)]) + "\n"


def vllm_flags(deployment: DeploymentRecord) -> list[tuple[str, ...]]:
    """The flags of `vllm serve`, each with its value.

    Raises:
        UserError: vLLM has no such KV format.
    """
    kv_dtype = _VLLM_KV_DTYPES.get(deployment.kv_cache_dtype)
    if kv_dtype is None:
        known = ", ".join(_VLLM_KV_DTYPES)
        raise UserError(
            f"vLLM {_VLLM_VERSION} has no {deployment.kv_cache_dtype} KV cache; plan with {known} to export to it"
        )
    flags: list[tuple[str, ...]] = [
        ("--tensor-parallel-size", str(deployment.tensor_parallel_size)),
        ("--max-model-len", str(deployment.max_model_len)),
        ("--gpu-memory-utilization", f"{deployment.gpu_memory_utilization:g}"),
        ("--kv-cache-dtype", kv_dtype),
        ("--block-size", str(_block_size(deployment.block_size))),
        ("--max-num-seqs", str(deployment.max_num_seqs)),
        ("--max-num-batched-tokens", str(deployment.max_num_batched_tokens)),
        (_switch("enable-prefix-caching", deployment.enable_prefix_caching),),
        (_switch("enable-chunked-prefill", deployment.enable_chunked_prefill),),
    ]
    if deployment.num_gpu_blocks_override is not None:
        flags.append(("--num-gpu-blocks-override", str(deployment.num_gpu_blocks_override)))
    if deployment.kv_cache_policy == "unified":
        flags.append(("--disable-hybrid-kv-cache-manager",))
    if deployment.enforce_eager:
        flags.append(("--enforce-eager",))
    if deployment.quantization is not None:
        flags.append(("--quantization", deployment.quantization))
    if deployment.num_speculative_tokens:
        flags.append(("--speculative-config", json.dumps(_speculative_config(deployment))))
    return flags


def _switch(name: str, on: bool) -> str:
    return f"--{name}" if on else f"--no-{name}"


def _speculative_config(deployment: DeploymentRecord) -> dict[str, object]:
    config: dict[str, object] = {"method": deployment.speculative_method}
    if deployment.draft_model is not None:
        config["model"] = deployment.draft_model
    config["num_speculative_tokens"] = deployment.num_speculative_tokens
    return config | _NGRAM_LOOKUP if deployment.speculative_method == "ngram" else config


def _remarks(plan: Plan) -> list[str]:
    deployment = plan.deployment
    one = deployment.replicas == 1
    gpus = f"{deployment.tensor_parallel_size} x {deployment.system}"
    remarks = [f"Rank {plan.rank} of a memwall plan: {deployment.model}, flags of vLLM {_VLLM_VERSION}."]
    if one:
        remarks.append(f"One replica on {gpus}: run this once.")
    else:
        remarks.append(
            f"{deployment.replicas} replicas, each on {gpus}: run this {deployment.replicas} times, each time on its "
            f"own GPUs and --port, behind a router ({deployment.router})."
        )
    if plan.loads is not None and plan.loads.met < plan.loads.of:
        remarks.append(f"Not sure: it met the SLO in {plan.loads.met} of {plan.loads.of} simulations of such loads.")
    if plan.step_times.basis is Basis.TRANSFERRED:
        remarks.append(f"Transferred: the plan's step times are of a {plan.result.step_time}.")
    if plan.result.evidence is Evidence.UNCALIBRATED:
        remarks.append("Uncalibrated: the plan's step times come from a data sheet, not from a measured GPU.")
    remarks += [*_weights_remarks(deployment), length_remark(deployment)]
    return [line for remark in remarks for line in textwrap.wrap(remark, _REMARK_WIDTH)]


def _weights_remarks(deployment: DeploymentRecord) -> list[str]:
    if deployment.hf_repo is None:
        return ["The plan was made from a config.json: replace the model's name by where its weights are."]
    return [
        f"{deployment.hf_repo} can be replaced by any fine-tune of the same shape, e.g. an -Instruct variant: the plan "
        f"is the same."
    ]


def length_remark(deployment: DeploymentRecord) -> str:
    """Where the limit on a request's length comes from, and how far it could be raised."""
    limit, most = deployment.max_model_len, deployment.max_position_embeddings
    text = (
        f"--max-model-len {limit} is what was planned for: the load's longest request, rounded up, unless a length was "
        f"given. Longer requests are refused"
    )
    if most is not None and most > limit:
        text += f"; the model takes up to {most} tokens, if the KV cache holds them"
    return f"{text}."


def _block_size(tokens: int) -> int:
    """vLLM's kernels take powers of two.

    Raises:
        UserError: for any other block size.
    """
    if tokens & (tokens - 1):
        raise UserError(f"block_size is {tokens}; vLLM takes powers of two, so plan with --block-size 16")
    return tokens
