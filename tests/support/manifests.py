"""The Kubernetes manifests as an operator gets them: rendered by kubectl or kustomize, never by us."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import ROOT

__all__ = ["KUBERNETES", "Manifest", "Manifests", "render"]

KUBERNETES = ROOT / "deploy" / "kubernetes"

# The first with components and with `patches` as they are written today. Debian 12 has 1.20.
_NEEDED = "kubectl 1.21 or newer, or kustomize 4.1 or newer, on the PATH"

Manifest = dict[str, Any]


class Manifests:
    """The objects of one overlay."""

    def __init__(self, text: str) -> None:
        self.all: list[Manifest] = [manifest for manifest in yaml.safe_load_all(text) if manifest]

    def find(self, kind: str, name: str = "nann") -> Manifest:
        """The one object of this kind and name."""
        (found,) = [m for m in self.all if (m["kind"], m["metadata"]["name"]) == (kind, name)]
        return found

    def of_kind(self, kind: str) -> list[Manifest]:
        """Every object of this kind."""
        return [manifest for manifest in self.all if manifest["kind"] == kind]

    @property
    def pod(self) -> Manifest:
        """The template of the server's pods."""
        template: Manifest = self.find("Deployment")["spec"]["template"]
        return template

    @property
    def container(self) -> Manifest:
        """The server's container."""
        (container,) = self.pod["spec"]["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def environment(self) -> dict[str, str | None]:
        """Its variables; None for what a Secret holds."""
        found: dict[str, str | None] = {}
        for source in self.container.get("envFrom", []):
            found |= self.find("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in self.container["env"]:
            assert ("value" in variable) != ("valueFrom" in variable), variable["name"]
            found[variable["name"]] = variable.get("value")
        return found


@functools.cache
def render(overlay: str, *components: str) -> Manifests:
    """``overlays/<overlay>`` with more components, as `kubectl kustomize` prints it."""
    directory = KUBERNETES / "overlays" / overlay
    if not components:
        return Manifests(_kustomize(directory))
    with tempfile.TemporaryDirectory() as folder:
        # As an operator's own overlay would; kustomize takes relative paths only.
        own = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(directory, Path(folder).resolve())],
            "components": [
                os.path.relpath(KUBERNETES / "components" / component, Path(folder).resolve())
                for component in components
            ],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
        return Manifests(_kustomize(Path(folder)))


def _kustomize(directory: Path) -> str:
    commands = {"kubectl": ["kubectl", "kustomize"], "kustomize": ["kustomize", "build"]}
    command = next((words for tool, words in commands.items() if shutil.which(tool)), None)
    if command is None:  # CI has none to install: Debian's is too old, PyPI and npm have none
        pytest.skip(f"what renders deploy/kubernetes is missing: {_NEEDED}")
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}Is {shutil.which(command[0])} too old? This takes {_NEEDED}"
    assert not done.stderr, done.stderr  # it warns there of what it will not take any more
    return done.stdout
