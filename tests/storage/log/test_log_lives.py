"""The log under crashes, by seed: clean runs keep every promise, and without any one of its syncs some run does not."""

import pytest

from engrid.storage.log.segments import CorruptLogError
from tests.storage.log.log_lives import LogLives

SEEDS = 400


def run(seed: int, ignore: set[str] | None = None) -> LogLives:
    lives = LogLives(seed, ignore=ignore)
    try:
        lives.run()
    except BaseException as error:
        error.add_note(f"seed {seed}: LogLives({seed}).run()")
        raise
    return lives


def all_sites() -> list[str]:
    return sorted(set().union(*(run(seed).sites for seed in range(40))))


def test_what_was_promised_is_there_once_and_in_order():
    runs = [run(seed) for seed in range(SEEDS)]
    assert sum(lives.recovered for lives in runs) > 20 * SEEDS
    assert sum(lives.cut for lives in runs) > SEEDS, "hardly anything was ever lost: the crashes are too mild"


def breaks(site: str) -> bool:
    for seed in range(5 * SEEDS):
        try:
            run(seed, {site})
        except (AssertionError, CorruptLogError):
            return True
    return False


def test_without_any_one_of_its_syncs_some_seed_breaks_a_promise():
    assert [site for site in all_sites() if not breaks(site)] == []


def test_every_kind_of_sync_is_among_them():
    places = sorted((site.split(":")[1], site.rpartition(" ")[2]) for site in all_sites())
    assert places == [
        ("_cut", "sync"),
        ("_cut", "sync"),
        ("_cut", "sync_folder"),
        ("_lead", "sync"),
        ("_lead", "sync_folder"),
        ("recover", "sync_folder"),
        ("truncate_before", "sync_folder"),
    ]


@pytest.mark.faults
def test_thousands_of_seeds():
    for seed in range(SEEDS, 20_000):
        run(seed)
