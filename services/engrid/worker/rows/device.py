"""Rows on their way from host memory to the device the model runs on.

On CUDA nothing here stops the host. Rows are placed straight into pinned memory; a stream of its own copies them while
the device computes what comes before; the layer's stream waits for the copy by an event, and the host goes on. They
travel as they are stored (half of float32 for bfloat16, a quarter for fp8) and are decoded on the device.

    host    network -> pinned buffer ─┐ (free again once its event is past)
    stream of copies                  └─ copy ── event
    stream of the model   layers before ........ waits for the event, decodes, Engram layer

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engrid.model import kernels
from engrid.rpc.frames import Bytes
from engrid.tables import RowFormat, decode_rows

MOST_BUFFERS = 8
"""Pinned buffers kept; a batch that finds them all in use gets one that is not kept."""


class DeviceRows(Protocol):
    """Takes rows as stored to values where the model wants them."""

    def buffer(self, shape: tuple[int, int, int]) -> Bytes:
        """uint8 of that shape, to be filled and handed to `values`."""

    def values(self, raw: Bytes, row_format: RowFormat, width: int) -> Tensor:
        """float32 [T, heads, width] of a filled buffer [T, heads, row_bytes]."""


def to_device(device: torch.device) -> DeviceRows:
    """How rows get to a device."""
    return CudaRows(device) if device.type == "cuda" else HostRows()


class HostRows:
    """The model computes where the rows are."""

    def buffer(self, shape: tuple[int, int, int]) -> Bytes:
        return np.empty(shape, np.uint8)

    def values(self, raw: Bytes, row_format: RowFormat, width: int) -> Tensor:
        positions, heads, row_bytes = raw.shape
        decoded = decode_rows(raw.reshape(-1, row_bytes), row_format, width)
        return torch.from_numpy(decoded.reshape(positions, heads, width))


class CudaRows:
    """Pinned buffers and a stream of copies. One thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned: list[tuple[Tensor, torch.cuda.Event | None]] = []
        """With the event of the last copy out of each; None: handed out."""

    def buffer(self, shape: tuple[int, int, int]) -> Bytes:
        size = int(np.prod(shape))
        for at, (pinned, copied) in enumerate(self._pinned):
            if pinned.numel() >= size and copied is not None and _is_past(copied):
                self._pinned[at] = (pinned, None)
                return _as_bytes(pinned, size).reshape(shape)
        pinned = torch.empty(max(1, size), dtype=torch.uint8, pin_memory=True)
        if len(self._pinned) < MOST_BUFFERS:
            self._pinned.append((pinned, None))
        return _as_bytes(pinned, size).reshape(shape)

    def values(self, raw: Bytes, row_format: RowFormat, width: int) -> Tensor:
        here = torch.from_numpy(raw)
        with torch.cuda.stream(self._stream):
            there = here.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        for at, (pinned, _) in enumerate(self._pinned):
            if pinned.data_ptr() == here.data_ptr():
                self._pinned[at] = (pinned, copied)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        there.record_stream(current)
        return decode(there, row_format).view(*raw.shape[:2], width)


def _is_past(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _as_bytes(pinned: Tensor, size: int) -> Bytes:
    rows: Bytes = pinned[:size].numpy()
    return rows


def decode(raw: Tensor, row_format: RowFormat) -> Tensor:
    """float32 [T, H, values] of rows [T, H, row_bytes] as stored, on their device; the bits of engrid.tables.decode_rows."""
    match row_format:
        case "float32":
            return raw.view(torch.float32)
        case "bfloat16":
            return raw.view(torch.bfloat16).float()
        case "fp8_e4m3_ue8m0":
            rows = raw.reshape(-1, raw.shape[-1])
            places = torch.arange(len(rows), device=raw.device).view(raw.shape[:2])
            return kernels.on(raw.device).dequantise(rows, places, torch.float32)
