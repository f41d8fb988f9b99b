"""Which replica a request goes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from planner.errors import unknown_name


class Router(ABC):
    """Chooses a replica for each request as it arrives."""

    @abstractmethod
    def choose(self, outstanding: Sequence[int], prefix: Sequence[Hashable]) -> int:
        """The replica's index.

        Args:
            outstanding: requests waiting or running at each replica.
            prefix: chained hashes of the request's prompt blocks; empty if unknown.
        """


class RoundRobin(Router):
    """Each replica in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, outstanding: Sequence[int], prefix: Sequence[Hashable]) -> int:
        chosen = self._next % len(outstanding)
        self._next = chosen + 1
        return chosen


class LeastOutstanding(Router):
    """The replica with the fewest requests waiting or running; the first of them if several."""

    def choose(self, outstanding: Sequence[int], prefix: Sequence[Hashable]) -> int:
        return min(range(len(outstanding)), key=outstanding.__getitem__)


class PrefixAffinity(Router):
    """The replica that has been sent the longest part of the prompt's prefix, unless it is far busier than another.

    The router keeps its own record of what it sent where, as cache-aware routers do (SGLang's keeps a radix tree); it
    does not see evictions. A replica is too busy when it has more than `absolute_slack` requests over the least busy
    one and more than `relative_slack` times as many.
    """

    def __init__(self, absolute_slack: int = 8, relative_slack: float = 1.5) -> None:
        self._absolute_slack = absolute_slack
        self._relative_slack = relative_slack
        self._sent: list[set[Hashable]] = []

    def choose(self, outstanding: Sequence[int], prefix: Sequence[Hashable]) -> int:
        if len(self._sent) != len(outstanding):
            self._sent = [set() for _ in outstanding]
        least = min(outstanding)
        limit = max(least + self._absolute_slack, least * self._relative_slack)
        # Longest match first, then the least busy, then the first.
        chosen, best = 0, (-1, 0)
        for replica, sent in enumerate(self._sent):
            if outstanding[replica] <= limit:
                rank = (_match_length(prefix, sent), -outstanding[replica])
                if rank > best:
                    chosen, best = replica, rank
        self._sent[chosen].update(prefix)
        return chosen


def _match_length(prefix: Sequence[Hashable], sent: set[Hashable]) -> int:
    length = 0
    for block_hash in prefix:
        if block_hash not in sent:
            break
        length += 1
    return length


ROUTERS: dict[str, type[Router]] = {
    "round-robin": RoundRobin,
    "least-outstanding": LeastOutstanding,
    "prefix-affinity": PrefixAffinity,
}


def make_router(name: str) -> Router:
    """A new router by its name.

    Raises:
        UserError: for a name not in `ROUTERS`.
    """
    if name not in ROUTERS:
        raise unknown_name("router", name, ROUTERS, f"it must be one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
