"""The SQL on a table is in one module."""

from __future__ import annotations

import re
from pathlib import Path

import leoflow_celery

PACKAGE = Path(leoflow_celery.__file__).parent
TABLES = PACKAGE / "store" / "models.py"


def test_only_one_module_knows_the_table_of_tries() -> None:
    knowing = [
        path for path in PACKAGE.rglob("*.py") if path != TABLES and "table_of(TaskInstance)" in path.read_text()
    ]
    assert [path.name for path in knowing] == ["task_instance_sql.py"]


def test_the_model_of_tries_is_imported_for_that_module_alone() -> None:
    texts = [path.read_text() for path in (PACKAGE / "store").rglob("*.py")]
    imports = re.compile(r"models import (?:\([^)]*|[^(\n]*)\bTaskInstance\b")
    assert sum(len(imports.findall(text)) for text in texts) == 1
