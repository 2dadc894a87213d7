"""Dense weights and their optimizer, copied between two steps, written to a checkpoint's files and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from tokenizers import Tokenizer

from engrid.model.transformer import Transformer
from engrid.storage.errors import CheckpointError

from .saved_model import OPTIMIZER, TOKENIZER, WEIGHTS, SavedModel
from .tokenizer import tokenizer_of


@dataclass(frozen=True)
class Dense:
    """A copy of all that is trained here, as it was after a step."""

    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]

    @classmethod
    def copy(cls, model: Transformer, optimizer: torch.optim.Optimizer) -> Dense:
        """Made between two steps; training may go on when this returns."""
        state = optimizer.state_dict()["state"]
        return cls(
            {name: _copy(value) for name, value in model.state_dict().items()},
            {f"{index}.{name}": _copy(value) for index, of in state.items() for name, value in of.items()},
        )

    def files(self) -> dict[str, bytes]:
        return {
            WEIGHTS: safetensors.torch.save(dict(self.weights)),
            OPTIMIZER: safetensors.torch.save(dict(self.optimizer)),
        }


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous().clone()


def load_dense(saved: SavedModel, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer where they were, bit for bit. Raises CheckpointError."""
    _load_weights(saved, model)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _load_tensors(saved, OPTIMIZER).items():
        index, _, key = name.partition(".")
        if not index.isdecimal():
            raise CheckpointError(f"{saved.manifest.name}/{OPTIMIZER} holds {name!r}, which is of no parameter")
        found.setdefault(int(index), {})[key] = value
    try:
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{saved.manifest.name}/{OPTIMIZER} does not match its manifest's model: {error}"
        ) from error


def load_model(saved: SavedModel, device: str) -> tuple[Transformer, Tokenizer]:
    """Dense weights and tokenizer, checked against the manifest. Raises CheckpointError."""
    model = Transformer(saved.model)
    _load_weights(saved, model)
    return model.to(torch.device(device)).eval(), _load_tokenizer(saved)


def _load_tokenizer(saved: SavedModel) -> Tokenizer:
    name = f"{saved.manifest.name}/{TOKENIZER}"
    content = saved.read_file(TOKENIZER)
    try:
        tokenizer = tokenizer_of(content.decode(), name)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is no UTF-8: {error}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) != saved.model.vocab_size:
        raise CheckpointError(f"{name} has {size} ids, the model of its checkpoint {saved.model.vocab_size}")
    return tokenizer


def _load_tensors(saved: SavedModel, name: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(saved.read_file(name))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{saved.manifest.name}/{name} is no safetensors file: {error}") from error
    return tensors


def _load_weights(saved: SavedModel, model: Transformer) -> None:
    weights = _load_tensors(saved, WEIGHTS)
    expected = model.state_dict()
    wrong = sorted(weights.keys() ^ expected.keys()) or [
        f"{name} {list(value.shape)}, not {list(expected[name].shape)}"
        for name, value in weights.items()
        if value.shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{saved.manifest.name}/{WEIGHTS} does not match its manifest's model: {wrong}")
    model.load_state_dict(weights)
