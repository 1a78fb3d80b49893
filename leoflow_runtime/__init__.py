"""Runs one Python callable as a task: ``python -m leoflow_runtime module:callable``, and is what its code may import.

``skip("why")`` ends the task as skipped, ``xcom_push(key, value)`` leaves a value beside the one that it returns, and
``context()`` says which task of which run this is.

It lives in the user's own interpreter (Python 3.8 or newer, nothing installed), so it imports the standard library
only. What it is told comes through the environment:

===========================  ==========================================================================================
``LEOFLOW_CALL_ARGS_JSON``   a JSON object, parameter name → value
``LEOFLOW_CALL_ARGS_FILE``   a file that holds the same, when it is too long for the environment
``LEOFLOW_XCOM_<PARAM>``     the XCom input of a parameter as JSON; the name is upper-cased
``LEOFLOW_XCOMFILE_<PARAM>`` a file that holds the same, for a value over 64 KiB (Linux refuses strings over 128 KiB)
``LEOFLOW_XCOM_PARAMS``      JSON list of the declared parameter names as they were written (optional)
``LEOFLOW_SOURCE_DIR``       searched for the module before anything else (optional)
``LEOFLOW_RETURN_VALUE_PATH``  where a result that is not None is written as JSON
``LEOFLOW_REASON_PATH``      where a reason beyond the exit code is left (``invalid_xcom``, ``invalid_spec``,
                             ``skipped``, ``up_for_reschedule`` or none), and on the next lines a sentence:
                             ``ValueError: bad row``
``LEOFLOW_PUSH_PATH``        where ``xcom_push`` appends a line of JSON: ``{"key": …, "value": …}``
===========================  ==========================================================================================

Exit codes: 0 done, 1 the callable raised (its traceback is on stderr), 2 it could not be called (module, attribute or
parameter; one line on stderr), 3 its result is not JSON.
"""

# Nothing is imported before it is asked for: `python -m` runs this file while a module of the user may stand in for one
# of the standard library.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from leoflow_runtime.in_task import Context, TaskSkipped, context, skip, xcom_push

__all__ = ["Context", "TaskSkipped", "context", "skip", "xcom_push"]


def __getattr__(name):  # type: ignore[no-untyped-def]
    if name in __all__:
        from leoflow_runtime import in_task

        return getattr(in_task, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
