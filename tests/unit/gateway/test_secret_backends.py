"""Values of files and of the environment: whose they are, which of them wins, and what can never be reached."""

from __future__ import annotations

import json
import logging
import os
import shutil
import string
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway import secret_backends
from leoflow_celery.gateway.secret_backends import (
    BackendFailed,
    EnvironmentBackend,
    FileBackend,
    Kind,
    Query,
    environment_id,
    file_name,
)
from leoflow_celery.settings import GatewaySettings


@pytest.fixture(autouse=True)
def every_warning_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_backends, "_warned", set())


def write(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root.mkdir(exist_ok=True)
    return root


def files(root: Path | None = None, **paths: Path) -> FileBackend:
    return FileBackend(GatewaySettings(secret_files=root, **paths))


def ask(backend: FileBackend | EnvironmentBackend, tenant: str, dag: str = "sales", kind: Kind = Kind.VARIABLE):
    return dict(backend.get(Query(kind, tenant, dag)))


class TestScopes:
    TREE: ClassVar = {
        "shared/variables/site": "shared",
        "shared/variables/region": "shared",
        "tenants/acme/variables/region": "acme",
        "tenants/acme/variables/table": "acme",
        "tenants/acme/dags/sales/variables/table": "acme sales",
        "tenants/acme/dags/sales/connections/db": "acme sales db",
        "tenants/acme/secrets/password": "acme secret",
        "tenants/beta/variables/region": "beta",
        "tenants/beta/dags/sales/variables/table": "beta sales",
    }

    @pytest.mark.parametrize(
        ("tenant", "dag", "kind", "seen"),
        [
            ("acme", "sales", Kind.VARIABLE, {"site": "shared", "region": "acme", "table": "acme sales"}),
            ("acme", "stock", Kind.VARIABLE, {"site": "shared", "region": "acme", "table": "acme"}),
            ("beta", "sales", Kind.VARIABLE, {"site": "shared", "region": "beta", "table": "beta sales"}),
            ("beta", "stock", Kind.VARIABLE, {"site": "shared", "region": "beta"}),
            ("gamma", "sales", Kind.VARIABLE, {"site": "shared", "region": "shared"}),
            ("default", "sales", Kind.VARIABLE, {"site": "shared", "region": "shared"}),
            ("acme", "sales", Kind.CONNECTION, {"db": "acme sales db"}),
            ("acme", "stock", Kind.CONNECTION, {}),
            ("beta", "sales", Kind.CONNECTION, {}),
            ("acme", "stock", Kind.SECRET, {"password": "acme secret"}),
            ("beta", "stock", Kind.SECRET, {}),
        ],
    )
    def test_the_nearest_scope_wins_and_no_other_is_seen(self, tmp_path, tenant, dag, kind, seen):
        assert ask(files(write(tmp_path / "root", self.TREE)), tenant, dag, kind) == seen

    def test_nothing_is_shared_that_is_not_said_to_be(self, tmp_path):
        backend = files(write(tmp_path / "root", {"tenants/acme/variables/x": "1", "variables/x": "2", "x": "3"}))
        assert ask(backend, "beta") == {}

    def test_a_flat_path_is_the_standard_tenants_alone(self, tmp_path):
        flat = write(tmp_path / "flat", {"region": "flat", "only": "flat"})
        root = write(
            tmp_path / "root",
            {
                "shared/variables/region": "shared",
                "shared/variables/site": "shared",
                "tenants/default/variables/own": "1",
            },
        )
        backend = files(root, variables_path=flat)
        assert ask(backend, "default") == {"region": "flat", "only": "flat", "site": "shared", "own": "1"}
        for other in ("acme", "Default", "default ", "DEFAULT", "./default"):
            assert ask(backend, other) == {"region": "shared", "site": "shared"}
        assert ask(files(variables_path=flat), "acme") == {}
        write(root, {"tenants/default/variables/region": "root"})
        assert ask(backend, "default")["region"] == "root"


ESCAPES = [
    "..",
    ".",
    "../beta",
    "acme/../beta",
    "beta/variables/..",
    "/etc",
    "acme\0",
    "acme\0/../../beta",
    "beta/",
    "./beta",
    "%2e%2e",
    "..%2fbeta",
    "tenants",
    "..data",
    "..data/tenants/beta",
    "dags",
    "BETA",
    "beta ",
    "ｂeta",
    "bet\u0430",
    "\udcff",
    "b" * 300,
    "*",
    "",
]


class TestEscapes:
    @pytest.mark.parametrize("escape", ESCAPES)
    def test_an_id_reaches_nothing_but_its_own(self, tmp_path, escape):
        tree = {
            "secret": "outside",
            "variables/region": "outside",
            "root/variables/region": "outside",
            "root/tenants/variables/region": "outside",
            "root/tenants/beta/variables/region": "beta",
            "root/tenants/beta/dags/sales/variables/region": "beta sales",
            "root/tenants/acme/dags/variables/region": "outside",
            "root/tenants/acme/dags/sales/variables/region": "acme sales",
            "root/tenants/..data/variables/region": "outside",
        }
        write(tmp_path, tree)
        backend = files(tmp_path / "root")
        assert ask(backend, escape) == {}
        assert ask(backend, "acme", escape) == {}
        assert ask(backend, "acme", f"../../beta/dags/{escape}") == {}

    @given(st.text(max_size=30), st.text(max_size=30))
    def test_two_ids_have_two_names_that_stay_in_their_place(self, one, other):
        for encode in (file_name, environment_id):
            assert (encode(one) == encode(other)) == (one == other)
        name = file_name(one)
        assert not name.startswith(".")
        assert set(name) <= {*string.ascii_letters, *string.digits, *"_.~-%"}
        assert set(environment_id(one)) <= {*string.ascii_letters, *string.digits, "_"}
        assert "__" not in environment_id(one)

    @pytest.mark.parametrize("tenant", ["acme eu", "acme%20eu", ".acme", "münchen", "a.b-c_d~e", "50%", "Acme"])
    def test_every_id_has_its_own_directory(self, tmp_path, tenant):
        backend = files(write(tmp_path / "root", {f"tenants/{file_name(tenant)}/variables/x": tenant}))
        assert ask(backend, tenant) == {"x": tenant}
        assert ask(backend, tenant.upper() + "x") == {}

    def test_a_file_system_that_ignores_case_mixes_no_tenants(self, tmp_path, monkeypatch):
        """There, opening another spelling works: only the list of names says which it is."""
        root = write(tmp_path / "root", {"tenants/Acme/variables/x": "1", "tenants/acme/variables/x": "1"})
        real = os.listdir
        monkeypatch.setattr(os, "listdir", lambda path: [name for name in real(path) if name != "acme"])
        assert ask(files(root), "Acme") == {"x": "1"}
        assert ask(files(root), "acme") == {}

    def test_names_asked_for_are_no_paths(self, tmp_path):
        root = write(tmp_path / "root", {"tenants/acme/secrets/x": "1", "tenants/beta/secrets/y": "2"})
        query = Query(Kind.SECRET, "acme", "sales", names=frozenset({"../../beta/secrets/y", "/etc/passwd"}))
        assert dict(files(root).get(query)).keys() & query.names == set()

    def test_directories_that_nobody_has_the_name_of_are_found(self, tmp_path):
        root = write(tmp_path / "root", {"tenants/acme corp/variables/x": "", "tenants/acme/dags/a b/variables/x": ""})
        assert [problem.rpartition(" is ")[2] for problem in files(root).problems()] == ["acme%20corp", "a%20b"]


def mount(directory: Path, tree: dict[str, str], version: str = "..2026_1") -> Path:
    """What the kubelet does: the files below a version, ``..data`` naming it, a link for every first part."""
    write(directory / version, tree)
    (directory / "..tmp").symlink_to(version)
    (directory / "..tmp").replace(directory / "..data")
    for first in {name.partition("/")[0] for name in tree}:
        if not (directory / first).is_symlink():
            (directory / first).symlink_to(f"..data/{first}")
    return directory


class TestLinks:
    @pytest.mark.parametrize(
        ("place", "below"),
        [
            (".", "tenants/acme/variables/"),
            ("tenants", "acme/variables/"),
            ("tenants/acme", "variables/"),
            ("tenants/acme/variables", ""),
        ],
    )
    def test_kubernetes_mounts_at_every_level(self, tmp_path, place, below):
        point = tmp_path / "root" / place
        mount(point, {f"{below}region": "eu-1\n", f"{below}table": "t"})
        backend = files(tmp_path / "root")
        assert ask(backend, "acme") == {"region": "eu-1", "table": "t"}
        mount(point, {f"{below}region": "eu-2\n"}, "..2026_2")
        shutil.rmtree(point / "..2026_1")
        assert ask(backend, "acme") == {"region": "eu-2"}
        assert ask(backend, "beta") == {}

    def test_links_to_other_scopes_and_out_are_not_followed(self, tmp_path, caplog):
        root = write(
            tmp_path / "root",
            {"tenants/acme/variables/own": "1", "tenants/beta/variables/region": "canary", "shared/variables/s": "0"},
        )
        outside = write(tmp_path / "outside", {"variables/x": "canary"})
        own = root / "tenants/acme/variables"
        (own / "stolen").symlink_to("../../beta/variables/region")
        (own / "passwd").symlink_to("/etc/passwd")
        (own / "dangling").symlink_to("nowhere")
        (own / "alias").symlink_to("own")
        (own / "directory").mkdir()
        (root / "tenants/acme/dags").symlink_to("../beta")
        (root / "tenants/gamma").symlink_to("beta")
        (root / "tenants/delta").symlink_to(outside)
        (root / "tenants/epsilon").mkdir()
        (root / "tenants/epsilon/variables").symlink_to("../beta/variables")
        os.mkfifo(own / "pipe")
        with caplog.at_level(logging.WARNING):
            assert ask(files(root), "acme") == {"own": "1", "alias": "1", "s": "0"}
            assert ask(files(root), "acme", "variables") == {"own": "1", "alias": "1", "s": "0"}
            for tenant in ("gamma", "delta", "epsilon"):
                assert ask(files(root), tenant) == {"s": "0"}
        assert "tenants/acme/variables/stolen is a link to another place" in caplog.text
        assert "canary" not in caplog.text
        before = len(caplog.records)
        ask(files(root), "acme")
        assert len(caplog.records) == before, "said once"

    @pytest.mark.parametrize("place", ["", "tenants/acme/variables"])
    @pytest.mark.parametrize("function", ["listdir", "realpath", "open", "stat"])
    @pytest.mark.parametrize("removed", ["", "tenants", "a"])
    def test_an_exchange_while_it_is_read_loses_no_name(self, tmp_path, monkeypatch, place, function, removed):
        """The kubelet exchanges the version at any moment, and then removes the old one file by file."""
        root = tmp_path / "root"
        below = "" if place else "tenants/acme/variables/"
        point = mount(root / place, {f"{below}a": "1", f"{below}b": "1"})
        backend = files(root)
        module = os.path if function == "realpath" else os
        real, exchanged = getattr(module, function), []

        def late(path, *arguments, **options):
            if "..2026_1" in str(path) and not exchanged:
                exchanged.append(path)
                mount(point, {f"{below}a": "2", f"{below}b": "2"}, "..2026_2")
                old = point / "..2026_1"
                if removed == "a":
                    (old / below / "a").unlink()
                else:
                    shutil.rmtree(old / removed, ignore_errors=True)
            return real(path, *arguments, **options)

        monkeypatch.setattr(module, function, late)
        assert ask(backend, "acme") in ({"a": "2", "b": "2"}, {"a": "1", "b": "1"})


class TestBroken:
    def test_a_root_that_is_gone_is_a_failure_and_no_unknown_name(self, tmp_path):
        backend = files(write(tmp_path / "root", {"tenants/acme/variables/x": "1"}))
        shutil.rmtree(tmp_path / "root")
        with pytest.raises(BackendFailed, match="LEOFLOW_GATEWAY_SECRET_FILES cannot be read: No such file"):
            ask(backend, "acme")

    def test_a_mount_that_is_not_there_yet_is_a_failure(self, tmp_path):
        root = write(tmp_path / "root", {"tenants/acme/variables/x": "1"})
        (root / "tenants/beta").mkdir()
        (root / "tenants/beta/variables").symlink_to("..data/variables")
        assert ask(files(root), "acme") == {"x": "1"}
        with pytest.raises(BackendFailed, match="No such file"):
            ask(files(root), "beta")

    def test_what_no_process_takes_is_left_out(self, tmp_path, caplog):
        root = write(tmp_path / "root", {"tenants/acme/variables/x": "1"})
        (root / "tenants/acme/variables/binary").write_bytes(b"\xff\xfe")
        with (root / "tenants/acme/variables/large").open("wb") as file:
            file.truncate(secret_backends.MAX_FILE_BYTES + 1)
        assert ask(files(root), "acme") == {"x": "1"}
        assert "binary is not UTF-8 text" in caplog.text
        assert "large has more than 1048576 bytes" in caplog.text

    @pytest.mark.parametrize("name", ["secret_files", "variables_path", "connections_path", "secrets_path"])
    def test_a_path_that_does_not_exist_is_a_configuration_error(self, tmp_path, name):
        with pytest.raises(ConfigurationError, match=f"LEOFLOW_GATEWAY_{name.upper()}="):
            FileBackend(GatewaySettings(**{name: tmp_path / "nowhere"}))

    def test_a_json_file_that_breaks_keeps_its_values(self, tmp_path, caplog):
        path = tmp_path / "variables.json"
        path.write_text(json.dumps({"region": "eu", "limits": {"rows": 1}}))
        backend = files(variables_path=path)
        assert ask(backend, "default") == {"region": "eu", "limits": '{"rows": 1}'}
        for broken in ('{"region": "canary', '["canary"]', "[" * 100_000):
            path.write_text(broken)
            assert ask(backend, "default")["region"] == "eu"
        assert "canary" not in caplog.text
        path.write_text('{"region": "us"}')
        assert ask(backend, "default") == {"region": "us"}


class TestEnvironment:
    VARIABLES: ClassVar = {
        "SHARED_VARIABLE__site": "shared",
        "VARIABLE__acme__region": "acme",
        "VARIABLE__acme__with__underscores": "acme",
        "VARIABLE__acme___private": "acme",
        "DAG_VARIABLE__acme__sales__region": "acme sales",
        "VARIABLE__acme_2Deu__region": "acme-eu",
        "VARIABLE__acme_5Feu__region": "acme_eu",
        "VARIABLE__acme_eu__region": "nobody: badly written",
        "SECRET__acme__password": "secret",
        "DAG_CONNECTION__beta__daily_20load__db": "beta db",
        "VARIABLE__acme": "nobody",
        "VARIABLE__acme__": "nobody",
        "VARIABLE": "nobody",
        "": "nobody",
    }

    @pytest.mark.parametrize(
        ("tenant", "dag", "kind", "seen"),
        [
            (
                "acme",
                "sales",
                Kind.VARIABLE,
                {"site": "shared", "region": "acme sales", "with__underscores": "acme", "_private": "acme"},
            ),
            (
                "acme",
                "stock",
                Kind.VARIABLE,
                {"site": "shared", "region": "acme", "with__underscores": "acme", "_private": "acme"},
            ),
            ("acme-eu", "sales", Kind.VARIABLE, {"site": "shared", "region": "acme-eu"}),
            ("acme_eu", "sales", Kind.VARIABLE, {"site": "shared", "region": "acme_eu"}),
            ("acme.eu", "sales", Kind.VARIABLE, {"site": "shared"}),
            ("ACME", "sales", Kind.VARIABLE, {"site": "shared"}),
            ("acme__with", "sales", Kind.VARIABLE, {"site": "shared"}),
            ("acme", "sales", Kind.SECRET, {"password": "secret"}),
            ("beta", "daily load", Kind.CONNECTION, {"db": "beta db"}),
            ("beta", "daily_load", Kind.CONNECTION, {}),
            ("default", "sales", Kind.VARIABLE, {"site": "shared"}),
        ],
    )
    def test_scopes(self, tenant, dag, kind, seen):
        assert ask(EnvironmentBackend(self.VARIABLES), tenant, dag, kind) == seen
