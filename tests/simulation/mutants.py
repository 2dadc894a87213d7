"""The product with one check taken out. Each is named by its text, so that a check that was rewritten is noticed here."""

import __future__

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engrid.shard.core import machine as core
from engrid.shard.journal import base, journal

from . import shard


@dataclass(frozen=True)
class Mutant:
    owner: object
    """Class or module."""
    function: str
    edits: tuple[tuple[str, str], ...]
    """Text that occurs once, and what stands there instead."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        kept = inspect.getattr_static(self.owner, self.function)
        setattr(self.owner, self.function, self._edited(kept))
        try:
            yield
        finally:
            setattr(self.owner, self.function, kept)

    def _edited(self, kept: object) -> object:
        plain = kept.__func__ if isinstance(kept, staticmethod) else kept
        """The same code with the edits; `staticmethod` is part of it."""
        source = textwrap.dedent(inspect.getsource(plain))
        for text, instead in self.edits:
            assert source.count(text) == 1, f"{self.function} holds {text!r} {source.count(text)} times"
            source = source.replace(text, instead)
        flags = __future__.annotations.compiler_flag
        names = dict(plain.__globals__)
        exec(compile(source, f"<mutant of {self.function}>", "exec", flags), names)
        return names[self.function]


def _core(function: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(core.ShardCore, function, edits)


CHECKS: dict[str, Mutant] = {
    # watermarks
    "a seq seen before is new": _core("_admit", ("if part.seq <= seen:", "if False:")),
    "a gap is no gap": _core("_admit", ("if part.seq > seen + 1:", "if False:")),
    "any step is the next": _core("_admit", ("push.step != state.step + 1 or ", "")),
    "the watermark is not kept": _core("push", ("state.watermarks[push.worker] = part.seq", "pass")),
    "a new attempt goes on with the old watermarks": _core(
        "begin_run", ("state.watermarks, state.held = {}, {}", "state.held = {}")
    ),
    "a new attempt keeps what the old one held": _core(
        "begin_run", ("state.watermarks, state.held = {}, {}", "state.watermarks = {}")
    ),
    "the same attempt again begins anew": _core("begin_run", ("continue", "pass")),
    "a base forgets watermarks": Mutant(base, "_from_json", (("watermarks=watermarks", "watermarks={}"),)),
    "a base forgets what was held": Mutant(base, "_add_held", (("while at < len(raw):", "while False:"),)),
    "a base takes what was committed for held": Mutant(base, "_add_held", (("not push.hold", "False"),)),
    # commits
    "a commit without its push": _core(
        "check_commit",
        ("if state.step < step and not being_applied and (held is None or held.step != step):", "if False:"),
    ),
    "a commit of any step": _core("commit", ("held is not None and held.step == step", "held is not None")),
    "a step of some of the workers": _core("_ready", ("len(state.held) == state.workers", "state.held")),
    "a step of workers that have not committed": _core(
        "_ready", ("all(held.committed for held in state.held.values())", "True")
    ),
    # runs and attempts
    "older attempts are not fenced": _core(
        "_check_run",
        ("state.run == run and attempt < state.attempt", "False"),
        ("(state.run, state.attempt) != (run, attempt)", "state.run != run"),
    ),
    "any run may push": _core("_check_run", ("(state.run, state.attempt) != (run, attempt)", "False")),
    "an older attempt may begin again": _core(
        "_check_beginner", ("state.run == run and state.attempt > attempt", "False")
    ),
    "an attempt that another began may begin": _core("_check_beginner", ('state.token not in ("", token)', "False")),
    "the log forgets who began": Mutant(journal.Journal, "_replay", (("record.token", '""'),)),
    "a base forgets who began": Mutant(base, "_from_json", (('token=each["token"]', 'token=""'),)),
    # epochs
    "a push of an older epoch": _core("check_push", ("self.check_epoch(table, push.epoch)", "pass")),
    "a commit of an older epoch": _core("check_commit", ("self.check_epoch(table, epoch)", "pass")),
    "a lookup of an older epoch": Mutant(
        shard.SimulatedShard, "_lookup", (("core.check_epoch(TABLE, epoch)", "pass"),)
    ),
    "an older placement": _core("plan_adoption", ("if placement.epoch <= self.epoch:", "if False:")),
    "a new table is as old as any": _core("adopt", ("since=self.epoch", "since=0")),
    "a base forgets who made the table": Mutant(base, "_from_json", (('since=each["since"]', "since=0"),)),
    "a table of another spec is the same": _core(
        "_same_rows",
        ("before == after and self.placement.tables[key[0]] == placement.tables[key[0]]", "before == after"),
    ),
    # answers that are durable
    "a commit seen before is durable": Mutant(journal.Journal, "commit", (("record or self._last()", "record"),)),
    "a run begun before is durable": Mutant(journal.Journal, "begin_run", (("record or self._last()", "record"),)),
    "a base need not wait for the log": Mutant(
        shard.SimulatedShard, "make_base", (("journal.wait_durable(base.record)", "pass"),)
    ),
    "a placement need not wait for a step": Mutant(shard.SimulatedShard, "_adopt", (("self._rest()", "pass"),)),
}
