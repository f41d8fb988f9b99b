"""The scheduler, its requests and its KV block accounting, as plain Python.

Standard library only: the GPU engine drives it with real steps, the planner's simulator with predicted ones.
There is one scheduler in this project.
"""

from engine.scheduling.block_pool import NULL_BLOCK, BlockPool
from engine.scheduling.kv_cache import KVCacheConfig, KVCacheManager
from engine.scheduling.request import Request, RequestStatus
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.scheduling.step import Step, StepShape

__all__ = [
    "NULL_BLOCK",
    "BlockPool",
    "KVCacheConfig",
    "KVCacheManager",
    "Request",
    "RequestStatus",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "StepShape",
]
