import pytest

from tests.clusters import cluster_up, engrid, succeeded, tiny_training


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def cluster(run_dir):
    """Two shards and two workers on a Ray of the module's own."""
    with cluster_up(run_dir, "--shards", 2, "--workers", 2) as record:
        yield record


@pytest.fixture(scope="module")
def trained(cluster, run_dir):
    """What `engrid train` printed, on both workers."""
    return succeeded(
        engrid("train", "--run-dir", run_dir, "--config", tiny_training(run_dir), "--out", run_dir, "--run", "tiny")
    )
