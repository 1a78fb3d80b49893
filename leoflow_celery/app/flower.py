"""What Flower shows when nobody says otherwise. The ``celery`` command loads Flower, and then our app."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

#: What a row is, how it stands and why, when, where; then what to search for and to copy.
TASKS_COLUMNS = "name,state,result,started,runtime,worker,kwargs,uuid"


def prepare_flower(app: Celery) -> None:
    """In Flower's process set the columns and their order, and the app whose results the API reads.

    Environment, configuration file and command line come after this, and win.
    """
    if "flower.options" not in sys.modules or "flower" not in sys.argv:
        return
    from tornado.options import options

    options.tasks_columns = TASKS_COLUMNS
    # Flower asks for results by the current app.
    app.set_current()
