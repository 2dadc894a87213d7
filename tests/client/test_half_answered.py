"""What a client does where one shard of two has done what it was asked, and its answer or the other shard is missing."""

from contextlib import contextmanager

import numpy as np
import pytest

from engrid.client import MemoryClient, TrainingRun
from engrid.control.tables import create_tables
from engrid.rpc.errors import BadRequestError, DeadlineExceededError, OutOfMemoryError
from tests.shards import local_shards, table

SPEC = table(init_std=0.0)
IDS = np.array([3, 900])
"""One row on each shard."""


@contextmanager
def store(folder):
    with local_shards(folder, 1, state=folder / "a") as (first,), MemoryClient(f"file:{folder}") as client:
        second = type(first)(
            type(first._service.config)(name="s1", directory=f"file:{folder}", state=folder / "b", memory_bytes=1 << 30)
        )
        try:
            create_tables(client, [SPEC])
            yield client, [first._service, second._service]
        finally:
            second.stop(0)


def begin(client, **more):
    return TrainingRun(client, run="r", attempt=1, worker=0, workers=1, tables=["t"], **more)


def gradients(value):
    return {"t": (IDS, np.full((2, SPEC.width), value, np.float32))}


def rows(client, step):
    return np.ascontiguousarray(client.lookup("t", IDS, step=step)).view(np.float32)


def once(owner, name, error, *, after):
    """The next call of a method raises; after: having done what it was asked."""
    real = getattr(owner, name)

    def call(*arguments, **options):
        setattr(owner, name, real)
        if after:
            real(*arguments, **options)
        raise error

    setattr(owner, name, call)


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("failing", [0, 1])
def test_other_gradients_take_the_place_of_those_whose_answer_was_lost(tmp_path, failing, after):
    """The shard that lost its answer holds the first gradients, under the number it is asked to take the second by."""
    with store(tmp_path) as (client, services):
        run = begin(client)
        once(services[failing], "push", DeadlineExceededError("the answer was lost"), after=after)
        with pytest.raises(DeadlineExceededError):
            run.push(gradients(5.0), step=1, learning_rate=1.0)
        run.push(gradients(2.0), step=1, learning_rate=1.0)
        run.push(gradients(1.0), step=2, learning_rate=1.0)
        assert (rows(client, 2) == -3).all()


def test_a_durable_step_is_on_the_disks_of_all_shards_when_it_is_answered(tmp_path):
    with store(tmp_path) as (client, services):
        run = begin(client, durable=True)
        run.push(gradients(1.0), step=1, learning_rate=1.0)
        assert all(service.journal.log.durable == service.journal.log.last for service in services)


def test_a_change_that_one_shard_fails_is_taken_back_on_the_others(tmp_path):
    """Else the one that has it serves a table that the next change knows nothing of."""
    with store(tmp_path) as (client, services):
        other = table("u", rows=10)
        adopt = services[1].adopt

        def fails(placement, *, check_only, **options):
            if not check_only and "u" in placement.tables:
                raise OutOfMemoryError("a test")
            return adopt(placement, check_only=check_only, **options)

        services[1].adopt = fails
        with pytest.raises(OutOfMemoryError, match="a test"):
            create_tables(client, [other])
        assert "u" not in client.connections.directory.placement().tables
        for service in services:
            assert "u" not in service.journal.core.placement.tables
            assert service.journal.core.epoch == client.connections.directory.placement().epoch
        services[1].adopt = adopt
        create_tables(client, [other])
        with pytest.raises(BadRequestError, match="exists"):
            create_tables(client, [other])
