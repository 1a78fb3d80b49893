"""A package with a back end of secrets, installed as pip would leave it: a module and its dist-info."""

from __future__ import annotations

from pathlib import Path

_MODULE = '''
"""A back end of somebody else's."""


class Vault:
    def get(self, query):
        if query.dag_id == "broken":
            raise RuntimeError("canary: the vault's own words")
        if query.dag_id == "exits":
            raise SystemExit("canary")
        if query.dag_id == "list":
            return ["canary"]
        values = {"who": f"{query.tenant_id}/{query.dag_id}/{query.kind}", "password": f"of {query.tenant_id}"}
        return {name: values[name] for name in values if query.names is None or name in query.names}


def fails():
    raise ValueError("canary: postgres://u:canary@host")


class NoBackend:
    pass
'''
_ENTRY_POINTS = """
[leoflow_celery.secret_backends]
vault = somebodys_vault:Vault
vault-fails = somebodys_vault:fails
vault-missing = somebodys_missing_module:Vault
vault-none = somebodys_vault:NoBackend
"""


def install(directory: Path) -> Path:
    """The directory to put on ``sys.path``; its entry points are ``vault`` and some that cannot work."""
    information = directory / "somebodys_vault-1.0.dist-info"
    information.mkdir(parents=True)
    (directory / "somebodys_vault.py").write_text(_MODULE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-vault\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(_ENTRY_POINTS)
    return directory
