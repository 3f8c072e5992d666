"""The examples for clusters: manifests against structural rules, and their commands run by the program itself.

There is no cluster here. What is checked is that the parts fit each other, and that a base that differs by one bit
stops everything before it serves.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub
from serving.corpus import write_sound
from tiny_models import llama_shapes

from gora_serve.serving.engine import MARGIN

EXAMPLES = Path(__file__).parent.parent / "examples"
NODE = EXAMPLES / "ray" / "node.sh"
MANIFESTS = EXAMPLES / "kubernetes" / "serve.yaml"
ADAPTED = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def manifest(base: Path, tmp_path: Path) -> Path:
    file = tmp_path / "base.manifest.json"
    run("hash", base, "--output", file)
    return file


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    shapes = {path: shape for path, shape in llama_shapes().items() if path.endswith(ADAPTED)}
    return write_sound(tmp_path / "sound", shapes)


def run(*words: object, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gora_serve", *map(str, words)]
    environment = {**os.environ, **environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done


def flip_a_bit(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(MANIFESTS.read_text())}


@pytest.fixture(scope="module")
def pod(parts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = parts["Deployment"]["spec"]["template"]["spec"]
    return found


def test_labels_and_ports_fit(parts: dict[str, Any], pod: dict[str, Any]) -> None:
    assert set(parts) == {"Service", "Deployment"}
    assert parts["Deployment"]["apiVersion"] == "apps/v1"
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert parts["Service"]["spec"]["selector"].items() <= labels
    assert parts["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    names = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert {port["targetPort"] for port in parts["Service"]["spec"]["ports"]} <= set(names)
    assert f"--port={names['http']}" in pod["containers"][0]["args"]


def test_no_container_may_do_more_than_it_needs(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]


def test_every_mount_has_a_volume_and_what_is_written_lies_on_one(pod: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = [mount for one in (*pod["initContainers"], *pod["containers"]) for mount in one["volumeMounts"]]
    assert {mount["name"] for mount in mounts} == set(volumes)
    for mount in mounts:
        claimed = "persistentVolumeClaim" in volumes[mount["name"]]
        assert claimed == mount.get("readOnly", False), "models are read, and only scratch is written"
    writable = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if not mount.get("readOnly")]
    for container in (*pod["initContainers"], *pod["containers"]):
        env = {one["name"]: one.get("value") for one in container["env"]}
        for name in ("HOME", "TMPDIR", "GORA_SERVE_CACHE"):
            assert any(str(env[name]).startswith(place) for place in writable), name
    store = next(word for word in pod["containers"][0]["args"] if word.startswith("--store="))
    assert store.removeprefix("--store=").rpartition("/")[0] in writable, "a folder below, which it makes itself"


def test_the_key_is_a_reference(parts: dict[str, Any], pod: dict[str, Any]) -> None:
    key = next(one for one in pod["containers"][0]["env"] if one["name"] == "VLLM_API_KEY")
    assert set(key) == {"name", "valueFrom"}
    assert set(key["valueFrom"]["secretKeyRef"]) == {"name", "key"}
    assert "Secret" not in parts
    assert not any("key" in word for word in pod["containers"][0]["args"])


def test_probes_and_patience(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    for probe in ("startupProbe", "readinessProbe"):
        assert f"--open-route={container[probe]['httpGet']['path']}" in container["args"], "a probe has no key"
    assert "tcpSocket" in container["livenessProbe"], "degraded is no reason to restart"
    timeout = next(word for word in container["args"] if word.startswith("--shutdown-timeout="))
    assert pod["terminationGracePeriodSeconds"] > int(timeout.partition("=")[2]) + MARGIN


def words_of(container: dict[str, Any], places: dict[str, Path]) -> list[str]:
    """A container's command line after `gora-serve`, with paths of this machine."""
    program, *words = [*container["command"], *container.get("args", [])]
    assert program == "gora-serve"
    for place, path in places.items():
        words = [word.replace(place, str(path)) for word in words]
    return words


def test_the_base_is_verified_before_anything_serves(pod: dict[str, Any], base: Path, manifest: Path) -> None:
    (verify,) = pod["initContainers"]
    assert verify["image"] == pod["containers"][0]["image"]
    served = pod["containers"][0]["command"][2]
    words = words_of(verify, {"/models/base": base, "/manifest/base.manifest.json": manifest})
    assert verify["command"][2] == served
    run(*words)
    flip_a_bit(base)
    done = run(*words, code=1)
    assert "error[GS-" in done.stderr


def test_the_server_starts_with_these_words(pod: dict[str, Any], base: Path, adapter: Path, tmp_path: Path) -> None:
    places = {"/models/base": base, "/models/adapters/sql": adapter, "/models/adapters/chat": adapter,
              "/cache": tmp_path / "cache"}  # fmt: skip
    words = words_of(pod["containers"][0], places)
    cut = words.index("--")
    words = [*words[:cut], "--dry-run", "--json", *words[cut:]]
    plan = json.loads(run(*words, VLLM_API_KEY="a-secret-key-0123456789").stdout)
    assert plan["models"] == ["base", "sql", "chat"]
    assert plan["environment"]["GORA_SERVE_OPEN_ROUTES"] == "/health"
    assert "a-secret-key" not in json.dumps(plan)
    assert plan["argv"][plan["argv"].index("--host") + 1] == "0.0.0.0"
    run(*words, VLLM_API_KEY="", code=2)


@pytest.fixture
def cluster(base: Path, manifest: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of node.sh: the real gora-serve verifies; ray and serve only note that they were reached."""
    programs = tmp_path / "bin"
    programs.mkdir()
    noted = tmp_path / "reached"
    real = f'exec "{sys.executable}" -m gora_serve "$@"'
    script(programs / "gora-serve", f'[[ $1 == serve ]] || {real}\nprintf "%s\\n" gora-serve "$@" >> "{noted}"')
    script(programs / "ray", f'printf "%s\\n" ray "$@" >> "{noted}"')
    (tmp_path / "ray.py").write_text("def init(**_): pass\ndef nodes(): return [{'Alive': True}] * 2\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH"), str(EXAMPLES.parent)])])
    return {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "BASE": str(base), "PYTHONPATH": path,
        "MANIFEST": str(manifest), "STORE": str(tmp_path / "store"), "PIPELINE_PARALLEL": "2", "NOTED": str(noted),
    }  # fmt: skip


def script(file: Path, text: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}\n")
    file.chmod(0o755)


def node(environment: dict[str, str], *words: str) -> tuple[int, list[str], str]:
    """Run node.sh; its exit status, the words of the program that it became, and what it said."""
    done = subprocess.run([NODE, *words], capture_output=True, text=True, env=environment, timeout=120, check=False)
    noted = Path(environment["NOTED"])
    return done.returncode, noted.read_text().splitlines() if noted.exists() else [], done.stderr


JOBS = (("head",), ("worker", "192.0.2.1"), ("serve", "sql=adapters/sql", "--", "--max-num-seqs", "8"))


@pytest.mark.parametrize("words", JOBS, ids=lambda words: words[0])
def test_a_machine_whose_base_differs_does_not_join(
    cluster: dict[str, str], base: Path, words: tuple[str, ...]
) -> None:
    flip_a_bit(base)
    code, reached, told = node(cluster, *words)
    assert code == 1
    assert reached == []
    assert "error[GS-" in told


def test_a_machine_whose_base_is_right_joins(cluster: dict[str, str]) -> None:
    assert node(cluster, "head")[:2] == (0, ["ray", "start", "--head", "--port", "6379", "--block"])


def test_a_worker_joins_the_head(cluster: dict[str, str]) -> None:
    assert node(cluster, "worker", "192.0.2.1")[:2] == (0, ["ray", "start", "--address", "192.0.2.1:6379", "--block"])


def test_the_head_serves_over_ray(cluster: dict[str, str]) -> None:
    code, reached, told = node(cluster, *JOBS[2])
    assert code == 0, told
    assert reached[:5] == ["gora-serve", "serve", cluster["BASE"], "--adapter", "sql=adapters/sql"]
    rest = reached[reached.index("--") + 1 :]
    assert rest == [
        "--distributed-executor-backend", "ray", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "2",
        "--max-num-seqs", "8",
    ]  # fmt: skip


def test_these_words_are_a_command_of_ours(cluster: dict[str, str], base: Path, adapter: Path) -> None:
    """As node.sh says them, the real program takes them, and hands Ray's options to vLLM."""
    _, reached, _ = node(cluster, "serve", f"sql={adapter}", "--", "--max-num-seqs", "8")
    words = reached[1:]
    cut = words.index("--")
    plan = json.loads(run(*words[:cut], "--dry-run", "--json", *words[cut:]).stdout)
    assert plan["models"] == [base.name, "sql"]
    argv = plan["argv"]
    assert argv[argv.index("--distributed-executor-backend") + 1] == "ray"
    assert argv[argv.index("--pipeline-parallel-size") + 1] == "2"


@pytest.mark.parametrize("words", [(), ("head", "x"), ("worker",), ("join",)])
def test_calls_that_make_no_sense(cluster: dict[str, str], words: tuple[str, ...]) -> None:
    code, reached, told = node(cluster, *words)
    assert (code, reached) == (2, [])
    assert "node.sh worker HEAD[:PORT]" in told


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", NODE], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", NODE], check=True)
    assert NODE.stat().st_mode & 0o111


def test_the_workflow_lets_sound_adapters_in_and_damaged_ones_not(
    hub: Hub, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """All its own commands but the installation, against a hub of this machine."""
    workflow = yaml.safe_load((EXAMPLES / "ci" / "verify.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["adapters"]["steps"] if "name" in step]
    commit = hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    for name in ("one", "two"):
        run("bind", adapter, "--base", base, "--output", tmp_path / "adapters" / name)
    named = {"REPOSITORY": "org/base", "COMMIT": commit}
    assert set(named) < set(workflow["env"])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def answers() -> list[int]:
        environment = {**os.environ, **named, "PATH": path}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]  # as GitHub runs a step
        done = [subprocess.run([*command, step], cwd=tmp_path, env=environment, check=False) for step in steps]
        return [one.returncode for one in done]

    assert answers() == [0, 0]
    flip_a_bit(tmp_path / "adapters" / "one")
    assert answers() == [0, 1]
