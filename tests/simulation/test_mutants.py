"""Without any one sync, watermark check or epoch check some seed of the simulation fails; which one is printed (-s)."""

import pytest

from .mutants import CHECKS
from .world import World

MOST_SEEDS = 500


def failing_seed(what: str, ignore: set[str] | None = None) -> int | None:
    for seed in range(MOST_SEEDS):
        try:
            World(seed, ignore=ignore).live()
        except (NameError, TypeError):
            raise  # the mutant itself is wrong
        except Exception as error:  # noqa: BLE001 - however the run notices
            print(f"without {what}: seed {seed}: {error!r:.100}")
            return seed
    return None


def all_sites() -> list[str]:
    sites: set[str] = set()
    for seed in range(40):
        world = World(seed)
        world.live()
        sites |= world.sites
    return sorted(sites)


@pytest.mark.parametrize("check", CHECKS)
def test_without_this_check_some_seed_fails(check):
    with CHECKS[check].in_place():
        assert failing_seed(check) is not None


def test_without_any_one_sync_some_seed_fails():
    sites = all_sites()
    places = [(site.split(":")[0], site.split(":")[1], site.rpartition(" ")[2]) for site in sites]
    assert sorted(places) == [
        ("base.py", "_write", "sync_folder"),  # the partial
        ("base.py", "_write", "sync_folder"),  # the published name
        ("base.py", "_write_file", "sync"),
        ("base.py", "write", "sync_folder"),  # the root, for the folder of bases
        ("log.py", "_cut", "sync"),  # whole segments
        ("log.py", "_cut", "sync"),  # the last one
        ("log.py", "_cut", "sync_folder"),
        ("log.py", "_lead", "sync"),
        ("log.py", "_lead", "sync_folder"),
        ("log.py", "recover", "sync_folder"),
        ("log.py", "truncate_before", "sync_folder"),
        ("partition.py", "finish", "sync"),
        ("partition.py", "finish", "sync_folder"),
    ]
    assert [site for site in sites if failing_seed(site, {site}) is None] == []
