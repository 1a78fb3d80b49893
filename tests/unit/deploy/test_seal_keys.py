"""The script that derives a launch worker's key on a machine without leoflow."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from cryptography.fernet import Fernet

from leoflow_celery.security import KeyRing
from tests.support.system import ROOT

SCRIPT = ROOT / "deploy/seal-key-for"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.parametrize("scope", ["k8s", "docker", "subprocess", "dispatch", "cancel"])
def test_the_script_derives_what_leoflow_derives(scope: str) -> None:
    master = ",".join(Fernet.generate_key().decode() for _ in range(2))
    derived = subprocess.run([SCRIPT, scope], input=master, capture_output=True, text=True, check=True).stdout.strip()
    assert derived == ",".join(f"{scope}:{key}" for key in KeyRing(master).keys(scope))


def test_the_script_says_what_is_missing() -> None:
    done = subprocess.run([SCRIPT, "k8s"], input="", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "LEOFLOW_SEAL_KEYS" in done.stderr
