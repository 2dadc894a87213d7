"""What `engrid train` trains: defaults, a checkpoint's configuration, a file and options, each winning over those before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engrid.storage.errors import CheckpointError
from engrid.worker.config import TrainConfig
from engrid.worker.saved_model import FOLDER, open_checkpoint

Values = dict[str, Any]
DEFAULT_OUT = "engrid-run"


def read_config(
    path: Path | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    model: Mapping[str, Any] | None = None,
    engram: Mapping[str, Any] | None = None,
    **given: Any,
) -> TrainConfig:
    """The whole configuration. None among the values: not given.

    path: of a JSON file that holds any part of a TrainConfig. model, engram: fields of the ModelConfig and of its
    EngramSpec. What was not said is made to fit what was: layers of the Engram that the model lacks, say.
    Raises ValueError, which names the file and the field, and CheckpointError where there is none to go on from.
    """
    said = _read_file(path) if path else {}
    folder = str((out or Path(said.get("out") or DEFAULT_OUT)).expanduser().resolve())
    try:
        values = _merge("", _base(folder, resume=resume), said)
        options = {**given, "out": folder, "resume": resume or None}
        options["model"] = {**(model or {}), "engram": _given(engram or {}) or None}
        options = _given({**options, "model": _given(options["model"]) or None})
        _switch_memory(values, said, options)
        values = _merge("", values, options)
        _fit(values, _both(said, options))
        if isinstance(values["text"], list) and all(isinstance(each, str) for each in values["text"]):
            values["text"] = [str(Path(each).expanduser().absolute()) for each in values["text"]]
        config = TrainConfig.from_json(values)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    if resume:
        open_checkpoint(Path(folder) / FOLDER).check_goes_on(config.steps)
    return config


def print_config(config: TrainConfig) -> None:
    """Prints it as JSON that `--config` takes."""
    print(json.dumps(config.to_json(), indent=1))


def _each_once(pairs: list[tuple[str, Any]]) -> Values:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def _read_file(path: Path) -> Values:
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_each_once)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; give a JSON file (engrid train --print-config)"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(found)[:50]!r}; see engrid train --print-config")  # noqa: TRY004
    if not isinstance(found.get("out", ""), str):
        raise ValueError(f"{path}: out is {found['out']!r}; give a folder")  # noqa: TRY004
    if isinstance(found.get("text"), str):
        found["text"] = [found["text"]]
    return found


def _base(out: str, *, resume: bool) -> Values:
    if not resume:
        return TrainConfig(run="default", out=out).to_json()
    saved = open_checkpoint(Path(out) / FOLDER)
    config = saved.manifest.about.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"checkpoint {saved.manifest.name} does not say how it was trained; it can be served only"
        )
    return TrainConfig.from_json(config).to_json()


def _given(values: Mapping[str, Any]) -> Values:
    return {name: value for name, value in values.items() if value is not None}


def _both(first: Values, second: Values) -> Values:
    """All that either says, object by object; where both do, the second."""
    nested = {
        name: _both(first[name], value)
        for name, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(name), dict)
    }
    return {**first, **second, **nested}


def _merge(where: str, base: Values, over: Mapping[str, Any]) -> Values:
    """`base` with what `over` says, object by object. Raises ValueError for a key that it has not, but where it is empty."""
    if base and (unknown := sorted(over.keys() - base.keys())):
        raise ValueError(f"{where or 'the configuration'} has unknown keys {unknown}; the keys are {sorted(base)}")
    merged = dict(base)
    for name, value in over.items():
        inner = f"{where}.{name}".lstrip(".")
        if isinstance(value, Mapping):
            before = merged.get(name)
            merged[name] = _merge(inner, before if isinstance(before, dict) else {}, value)
        elif isinstance(merged.get(name), dict) and value is not None:
            raise ValueError(f"{inner} is {value!r}; give a JSON object")
        else:
            merged[name] = value
    return merged


def _switch_memory(values: Values, said: Values, options: Values) -> None:
    """A model whose memory is switched off has no Engram, unless one is asked for in the same breath."""
    if options.get("memory", values.get("memory")) == "off" and isinstance(values.get("model"), dict):
        if "engram" in options.get("model", {}):
            raise ValueError("memory is 'off', but options of the Engram are given; leave out one of the two")
        values["model"]["engram"] = None
    elif options.get("memory") and values["model"].get("engram") is None and not said.get("model"):
        values["model"]["engram"] = TrainConfig(run="default", out="x").to_json()["model"]["engram"]


def _fit(values: Values, said: Values) -> None:
    """Makes what nobody said fit what was said. What is wrong stays, for the checks."""
    try:
        model, of_model = values["model"], said.get("model") or {}
        if "length" not in said:
            values["length"] = min(values["length"], model["context"])
        if "kv_heads" not in of_model and model["heads"] % model["kv_heads"]:
            model["kv_heads"] = 1
        if "top_k" not in of_model:
            model["top_k"] = min(model["top_k"], model["experts"])
        if (engram := model["engram"]) is None:
            return
        of_engram = of_model.get("engram") or {}
        if "layers" not in of_engram:
            engram["layers"] = [layer for layer in engram["layers"] if layer < model["layers"]] or [0]
        rows, orders = list(engram["vocab_size"]), engram["max_ngram"] - 1
        if len(rows) != orders and (len(rows) == 1 or "vocab_size" not in of_engram):
            engram["vocab_size"] = [*rows, *[rows[-1]] * orders][:orders]
    except (TypeError, KeyError, IndexError, ZeroDivisionError):
        return
