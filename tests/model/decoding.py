"""What the tests of decoding share: sources of rows that are watched or exact."""

import dataclasses

from tests.model.test_transformer import make


class Doubled:
    """Pending rows in float64."""

    def __init__(self, pending):
        self.pending = pending

    def rows(self, layer):
        return self.pending.rows(layer).double()


class DoubledRows:
    """A row source for a model in float64."""

    def __init__(self, source):
        self.source = source

    def prefetch(self, lookups):
        return Doubled(self.source.prefetch(lookups))


def exact(config=None):
    """A model in float64 and its memory: no two ways of computing its logits differ by more than 1e-12 or so, so
    what is likelier is likelier in all of them."""
    model, memory = make(config)
    return model.double(), dataclasses.replace(memory, source=DoubledRows(memory.source))


class WatchedRows:
    """A row source that notes how many positions it was asked for."""

    def __init__(self, source, events):
        self.source, self.events = source, events

    def prefetch(self, lookups):
        self.events.append(("ask", len(lookups[0].keys)))
        return self.source.prefetch(lookups)


def watched(config=None, base=make):
    """A model, its memory, and a list to which ("ask", tokens) and ("compute", tokens) are added as they happen."""
    model, memory = base(config)
    events = []
    model.register_forward_pre_hook(lambda _, args: events.append(("compute", args[0].numel())))
    return model, dataclasses.replace(memory, source=WatchedRows(memory.source, events)), events
