"""Where Python looks for modules, put right before anything else is imported: this module imports what has been by then."""

import os
import sys


def look_last_in_the_working_folder() -> None:
    """An empty entry in PYTHONPATH, as `PYTHONPATH=$PYTHONPATH:/mine` leaves, means the working folder: its random.py or
    queue.py would be taken for Python's own. It is looked in last instead."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    try:
        here = os.getcwd()  # noqa: PTH109 - pathlib would be imported
    except FileNotFoundError:
        return
    if len(entries) > 1 and "" in entries and here not in entries and here in sys.path[1:]:
        sys.path.append(sys.path.pop(sys.path.index(here, 1)))
