"""The shard's whole state, simulated: hundreds of seeds here, thousands under `make faults`, and any one again:

SIMULATION_SEED=123 .venv/bin/python -m pytest tests/simulation -k one_seed
"""

import os

import pytest

from .world import World

SEEDS = 200
MORE_SEEDS = 4000


def live(seed: int) -> World:
    world = World(seed)
    try:
        world.live()
    except BaseException as error:
        last = "\n    ".join(list(world.trace)[-25:])
        error.add_note(
            f"seed {seed}; run it again: SIMULATION_SEED={seed} .venv/bin/python -m pytest tests/simulation -k one_seed\n"
            f"what happened last:\n    {last}"
        )
        raise
    return world


def test_what_was_acknowledged_is_there_once_whatever_fails():
    worlds = [live(seed) for seed in range(SEEDS)]
    assert sum(world.steps for world in worlds) > 3 * SEEDS
    assert sum(world.crashes for world in worlds) > 3 * SEEDS
    assert sum(world.bases for world in worlds) > 2 * SEEDS
    assert sum(world.attempts for world in worlds) > 2 * SEEDS


def test_a_seed_replays_exactly():
    first, second = live(3), live(3)
    assert list(first.trace) == list(second.trace)
    assert len(first.trace) > 50


@pytest.mark.skipif("SIMULATION_SEED" not in os.environ, reason="replays the seed named in SIMULATION_SEED")
def test_one_seed():
    live(int(os.environ["SIMULATION_SEED"]))


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_thousands_of_seeds():
    for seed in range(SEEDS, SEEDS + MORE_SEEDS):
        live(seed)
