from pathlib import Path

import pytest
import torch

from engrid.addressing.spec import EngramSpec
from engrid.model.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def small_spec(**changes):
    base = {"layers": (1, 2), "max_ngram": 3, "heads": 2, "vocab_size": (50, 70), "row_width": 8, "pad_token_id": 0}
    return EngramSpec(**{**base, "init_std": 1.0, **changes})


def small_config(**changes):
    base = {
        "vocab_size": 40,
        "d_model": 32,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "context": 64,
        "experts": 4,
        "top_k": 2,
        "shared_experts": 1,
        "expert_width": 16,
        "engram": small_spec(),
    }
    return ModelConfig(**{**base, **changes})


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
