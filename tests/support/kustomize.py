"""The deployed manifests, as ``kubectl kustomize`` renders them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.support.images import ROOT
from tests.support.requirements import require

DEPLOY = ROOT / "deploy" / "kubernetes"


def render(directory: Path) -> list[dict[str, Any]]:
    """Every object of a kustomization; a file that is wrong fails with the tool's own words."""
    done = subprocess.run([_kubectl(), "kustomize", str(directory)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def overlay(directory: Path, kustomization: dict[str, Any]) -> list[dict[str, Any]]:
    """What an operator's own kustomization in ``directory`` renders to; ``relative`` gives the paths in it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kustomization.yaml").write_text(
        yaml.safe_dump({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **kustomization})
    )
    return render(directory)


def relative(part: str, directory: Path) -> str:
    """A directory below ``deploy/kubernetes`` as a kustomization in ``directory`` names it."""
    return os.path.relpath(DEPLOY / part, directory.resolve())


def _kubectl() -> str:
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    found = shutil.which("kubectl", path=os.pathsep.join(filter(None, [assets, os.environ.get("PATH", "")])))
    return found or require("kubernetes", "no kubectl, which renders the manifests")
