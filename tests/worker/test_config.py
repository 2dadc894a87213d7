"""A run's configuration travels as JSON, and whatever is wrong in it is named before anything is made."""

import dataclasses
import json
import math

import pytest

from engrid.worker.config import TrainConfig
from tests.worker.conftest import tiny_config, tiny_model


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(run="r", out="o"),
        tiny_config("somewhere", memory="in_process", steps=3, learning_rate=0.5, warmup=0, evaluations=0, save=False),
        tiny_config("somewhere", memory="off", model=tiny_model(engram=None), seed=7),
    ],
    ids=["default", "changed", "off"],
)
def test_configuration_survives_json(config):
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("where", [(), ("model",), ("model", "engram")], ids=".".join)
@pytest.mark.parametrize("problem", ["unknown", "missing"])
def test_unknown_and_missing_keys_are_refused_by_name(where, problem):
    values = json.loads(json.dumps(tiny_config("o").to_json()))
    inner = values
    for key in where:
        inner = inner[key]
    if problem == "unknown":
        inner["wings"], name = 2, "wings"
    else:
        name = "layers" if where else "steps"
        del inner[name]
    with pytest.raises(ValueError, match=f"{problem} keys.*'{name}'"):
        TrainConfig.from_json(values)


@pytest.mark.parametrize("values", [None, [], 3, "text"])
def test_what_is_no_object_is_refused(values):
    with pytest.raises(ValueError, match="TrainConfig"):
        TrainConfig.from_json(values)


BAD = [
    ("run", ""),
    ("run", "a/b"),
    ("run", "a b"),
    ("memory", "cloud"),
    ("memory", None),
    ("steps", 0),
    ("batch", 0),
    ("batch", -3),
    ("length", 0),
    ("length", 513),
    ("evaluations", -1),
    ("learning_rate", 0),
    ("learning_rate", -1e-3),
    ("table_learning_rate_ratio", 0),
    ("warmup", -1),
]

BAD_TYPES = [
    ("run", "-x"),
    ("run", "naïve"),
    ("steps", "8"),
    ("steps", 2.5),
    ("batch", 1.5),
    ("seed", -1),
    ("learning_rate", math.nan),
    ("learning_rate", math.inf),
    ("table_learning_rate_ratio", math.nan),
]
"""What JSON can hold and a run cannot begin with."""


@pytest.mark.parametrize(("field", "value"), BAD + BAD_TYPES)
def test_wrong_field_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        TrainConfig.from_json({**tiny_config("o").to_json(), field: value})


@pytest.mark.parametrize("change", [{"layers": 1}, {"heads": 5}, {"top_k": 9}, {"context": 0}, {"d_model": "wide"}])
def test_wrong_field_of_the_model_is_refused_by_name(change):
    values = tiny_config("o").to_json()
    with pytest.raises(ValueError, match=rf"\b{next(iter(change))}\b"):
        TrainConfig.from_json({**values, "model": {**values["model"], **change}})


def test_memory_without_an_engram_is_refused():
    for memory in ("remote", "in_process"):
        with pytest.raises(ValueError, match=f"memory is '{memory}', but the model has no engram"):
            tiny_config("o", memory=memory, model=tiny_model(engram=None))
    assert tiny_config("o", memory="off", model=tiny_model(engram=None)).model.engram is None


def test_length_may_be_the_whole_context():
    assert dataclasses.replace(tiny_config("o"), length=512).length == 512
