"""``python -m leoflow_runtime module:callable``."""

import os
import sys


def _ours_first():  # type: () -> list[str]
    """Keep only the standard library and us on the path, so that no module of the user stands in for one of ours.

    Returns the whole path, for the user's code. ``token.py`` beside ``dag.py`` is a file like any other.
    """
    if os.environ.get("PYTHONSAFEPATH") == "leoflow":  # set by the agent: the interpreter itself is not fooled either
        del os.environ["PYTHONSAFEPATH"]
        if sys.version_info >= (3, 11):  # noqa: UP036 - the user's interpreter may be older
            sys.path.insert(0, os.getcwd())
    whole, library = list(sys.path), os.path.dirname(os.path.abspath(os.__file__))
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    beside = os.path.join(os.path.dirname(library), "python{}{}.zip".format(*sys.version_info[:2]))
    sys.path[:] = [*(path for path in whole if _is_library(path, library) or path == beside), ours]
    return whole


def _is_library(path, library):  # type: (str, str) -> bool
    below = path == library or path.startswith(library + os.sep)
    return below and not path.endswith(("site-packages", "dist-packages"))


if __name__ == "__main__":
    _PATH = _ours_first()
    from leoflow_runtime.runner import main

    sys.path[:] = _PATH
    sys.exit(main(sys.argv[1:]))
