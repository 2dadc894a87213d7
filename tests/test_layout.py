"""The four roots are one namespace: an __init__.py in a root, or in engrid itself, would hide the other three."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("root", ["proto", "model", "services", "cluster"])
def test_roots_and_namespace_hold_no_init(root):
    assert (ROOT / root / "engrid").is_dir()
    assert not (ROOT / root / "__init__.py").exists()
    assert not (ROOT / root / "engrid" / "__init__.py").exists()


def test_every_portion_is_importable_from_one_namespace():
    import engrid

    found = {Path(path).parent.name for path in engrid.__path__}
    assert {"proto", "model", "services", "cluster"} <= found
