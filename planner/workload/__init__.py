"""Workloads: traces in the formats people bring, and synthetic ones."""

from planner.workload.formats import FORMATS, load_workload, save_workload
from planner.workload.synthetic import (
    Empirical,
    Fixed,
    LengthDistribution,
    LogNormal,
    SyntheticSpec,
    Uniform,
    default_workload,
    length_trace,
    parse_length,
    synthesize,
)
from planner.workload.workload import MAX_TOKENS, LengthSummary, Workload, WorkloadSummary

__all__ = [
    "FORMATS",
    "MAX_TOKENS",
    "Empirical",
    "Fixed",
    "LengthDistribution",
    "LengthSummary",
    "LogNormal",
    "SyntheticSpec",
    "Uniform",
    "Workload",
    "WorkloadSummary",
    "default_workload",
    "length_trace",
    "load_workload",
    "parse_length",
    "save_workload",
    "synthesize",
]
