"""Messages between workers, shards and the operator: lost, late, twice and in any order, as the world's seed says."""

import random
from dataclasses import dataclass, field
from typing import Any

from engrid.rpc.errors import EngridError


@dataclass(frozen=True)
class Request:
    """What someone asks of a shard."""

    sender: str
    shard: str
    kind: str
    """push, commit, begin_run, adopt, lookup."""
    body: Any
    mark: Any = None
    """The sender's own: which of its messages this is."""

    def __str__(self) -> str:
        return f"{self.kind} {self.mark} {self.sender}->{self.shard}"


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    request: Request
    value: Any = None
    error: EngridError | None = None

    def __str__(self) -> str:
        return f"answer to {self.request}: {self.error!r}" if self.error else f"answer to {self.request}: {self.value}"


Message = Request | Answer


@dataclass
class Network:
    random: random.Random
    faulty: bool = True
    waiting: list[Message] = field(default_factory=list)
    late: list[Message] = field(default_factory=list)
    """Forgotten by everyone, and not lost: they come when nobody thinks of them."""

    def send(self, message: Message) -> None:
        if not self.faulty:
            self.waiting.append(message)
            return
        draw = self.random.random()
        if draw < 0.1:
            return
        if draw > 0.2:
            self.waiting.append(message)
        if draw < 0.35 and isinstance(message, Request):
            self.late.append(message)

    def take(self) -> Message | None:
        """Any message that is under way; where the network is not faulty, the oldest."""
        if not self.waiting:
            return None
        if not self.faulty:
            return self.waiting.pop(0)
        index = self.random.randrange(min(len(self.waiting), 12))
        if self.random.random() < 0.1:
            return self.waiting[index]
        return self.waiting.pop(index)

    def take_late(self) -> Message | None:
        return self.late.pop(self.random.randrange(len(self.late))) if self.late else None

    def take_for(self, shard: str) -> Request | None:
        """Any request to the shard."""
        indices = [i for i, m in enumerate(self.waiting) if isinstance(m, Request) and m.shard == shard]
        if not indices:
            return None
        message = self.waiting.pop(self.random.choice(indices))
        assert isinstance(message, Request)
        return message

    def forget(self, kind: str) -> None:
        """Nobody will ever see these any more."""
        for messages in (self.waiting, self.late):
            messages[:] = [m for m in messages if not (isinstance(m, Request) and m.kind == kind)]
