"""What fits where: memory per shard on this machine, and on the nodes of a Ray cluster that is joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import COMPUTE_RESOURCE, MEMORY_RESOURCE, ClusterConfig, ClusterError

GIB_IN_MIB = 1024


def memory_here(config: ClusterConfig) -> int:
    """MiB for each shard on this machine; raises ClusterError where it lacks them."""
    from engrid.host.memory import memory

    free = memory().free >> 20
    if config.memory_gib is None:
        return max(1, free // 2 // config.shards)
    wanted = _mib(config.memory_gib)
    if wanted * config.shards > free:
        raise ClusterError(
            f"{config.shards} shards of {config.memory_gib:g} GiB need {config.memory_gib * config.shards:g} GiB, "
            f"this machine has {free / GIB_IN_MIB:.1f} GiB free; ask for less with --memory or --shards. "
            "Nothing was started"
        )
    return wanted


def memory_joined(config: ClusterConfig, nodes: Sequence[Mapping[str, Any]], available: Mapping[str, float]) -> int:
    """MiB for each shard on a joined cluster: as asked for, or the most that all shards can have alike.

    nodes, available: as ray.nodes() and ray.available_resources() give them. Raises ClusterError, naming what each node offers, where shards or workers do
    not fit, and where a directory file would have to serve several hosts.
    """
    alive = [node for node in nodes if node["Alive"]]
    hosts = sorted({node["NodeManagerAddress"] for node in alive})
    if len(hosts) > 1 and config.redis is None:
        raise ClusterError(
            f"the cluster spans {len(hosts)} hosts ({', '.join(hosts)}), and a directory file serves one; "
            "give --redis redis://HOST:PORT"
        )
    memory = _Offer(MEMORY_RESOURCE, alive, available)
    if config.memory_gib is None:
        mib = min(largest_share(list(memory.nodes.values()), config.shards), int(memory.free // config.shards))
    else:
        mib = _mib(config.memory_gib)
    memory.check(max(1, mib), config.shards, "shards")
    _Offer(COMPUTE_RESOURCE, alive, available).check(1, config.workers, "workers")
    return mib


def largest_share(offers: Sequence[float], count: int) -> int:
    """The largest whole number that fits `count` times into the offers, none of it spanning two; 0 if there is none."""
    shares = {int(offer // parts) for offer in offers for parts in range(1, count + 1)} - {0}
    return max((share for share in shares if sum(int(offer // share) for offer in offers) >= count), default=0)


class _Offer:
    """One resource of a Ray cluster: what each node has, and what others have left of it in all.

    Ray does not say publicly what is left on each node; where what is left lies in pieces too small, the actors find
    no place and `up` says so when its time is over.
    """

    def __init__(self, resource: str, nodes: Sequence[Mapping[str, Any]], available: Mapping[str, float]) -> None:
        self.resource = resource
        self.free = available.get(resource, 0.0)
        self.nodes = {
            f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": node["Resources"].get(resource, 0.0) for node in nodes
        }

    def check(self, each: int, count: int, what: str) -> None:
        room = min(sum(int(offer // each) for offer in self.nodes.values()), int(self.free // each))
        if room < count:
            listed = ", ".join(f"{node}: {offer:g}" for node, offer in sorted(self.nodes.items()))
            raise ClusterError(
                f"{count} {what} need {each} of the Ray resource {self.resource} each, and there is room for {room} "
                f"({listed}; {self.free:g} in all not taken by others); start nodes with "
                f"--resources '{{\"{self.resource}\": N}}', or ask for less. Nothing was started"
            )


def _mib(gib: float) -> int:
    return max(1, int(gib * GIB_IN_MIB))
