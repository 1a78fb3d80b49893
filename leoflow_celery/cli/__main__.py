"""``python -m leoflow_celery.cli``: the command without a console script, as ``leoflow lite`` starts its gateway."""

from leoflow_celery.cli.main import main

main()
