"""Runs one Python callable as a task: ``python -m leoflow_runtime module:callable``.

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
===========================  ==========================================================================================

Exit codes: 0 done, 1 the callable raised (its traceback is on stderr), 2 it could not be called (module, attribute or
parameter; one line on stderr), 3 its result is not JSON.
"""
