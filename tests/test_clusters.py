"""Clusters: their files, what a job sends, what the doctor says, and a real one of two nodes."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssl2rl_ray import doctor as doctors
from ssl2rl_ray import submit as jobs
from ssl2rl_ray.cli import main
from ssl2rl_ray.config import KINDS
from ssl2rl_ray.doctor import doctor, format_report, judge
from ssl2rl_ray.runs import git_revision
from ssl2rl_ray.schema import ConfigError
from ssl2rl_ray.submit import command_line, connect, follow, job_of, read_token

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "cluster.yaml", *sorted((ROOT / "deploy").iterdir())]
SMOKE = ROOT / "tune_configs" / "smoke.yaml"


# ---- the deployment files ------------------------------------------------------------------------


def ray_starts(file: Path) -> dict[str, str]:
    """How a file starts Ray: the shell text around ``ray start``, of the head and of workers."""
    if file.suffix == ".sbatch":
        text = file.read_text().replace("\\\n", " ")
        (common,) = [line for line in text.splitlines() if line.startswith("export RAY_AUTH_MODE")]
        lines = [common + " " + line for line in text.splitlines() if "$start $ports" in line]
        return {"head": lines[0], "worker": lines[1]}
    (document,) = [
        d for d in yaml.safe_load_all(file.read_text()) if d.get("kind") != "NetworkPolicy"
    ]
    if "provider" in document:
        return {node: document[f"{node}_start_ray_commands"][-1] for node in ("head", "worker")}
    spec = document["spec"]["rayClusterSpec"]
    groups = {"head": spec["headGroupSpec"], "worker": spec["workerGroupSpecs"][0]}
    return {node: json.dumps(group) for node, group in groups.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_deployment_file_asks_for_a_token_hides_the_dashboard_and_shares_storage(file):
    text, starts = file.read_text(), ray_starts(file)
    for start in starts.values():
        assert "RAY_AUTH_MODE=token" in start or '"RAY_AUTH_MODE", "value": "token"' in start
        assert "SSL2RL_STORAGE" in start
    if file.suffix == ".yaml" and "kind: RayJob" in text:
        assert_only_the_operator_reaches_the_dashboard(file)
    else:
        assert "--dashboard-host=127.0.0.1" in starts["head"]
        assert "0.0.0.0" not in text
    assert "storage_path" in text or "persistentVolumeClaim" in text


def assert_only_the_operator_reaches_the_dashboard(file: Path) -> None:
    """KubeRay's operator must ask the dashboard from outside the pod; nobody else may."""
    policy, job = yaml.safe_load_all(file.read_text())
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(group["template"]["metadata"]["labels"] == labels for group in groups)
    among, operator = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert set(operator["from"][0]) == {"namespaceSelector", "podSelector"}  # both, not either
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert job["spec"]["submissionMode"] == "SidecarMode"


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/aws.yaml"])
def test_ray_s_own_schema_takes_the_cluster_files(file, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("HOME", "/nowhere")
    config = prepare_config(yaml.safe_load((ROOT / file).read_text()))
    validate_config(config)
    (mount,) = [k for k in config["file_mounts"] if "auth_token" in k]
    assert mount == config["file_mounts"][mount] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in c for c in config["setup_commands"])
    (pip,) = [c for c in config["setup_commands"] if "ssl2rl-ray" in c]
    (wanted,) = [mount for mount in config["file_mounts"] if mount.endswith("ssl2rl-ray")]
    words = pip.replace("~", "$HOME").replace("$HOME/ssl2rl-venv/bin/pip", "echo")
    said = subprocess.run(["bash", "-c", words], env={"HOME": "~"}, capture_output=True, text=True)
    assert said.stdout == f"install --quiet {wanted}[bo]\n"
    checks = [*config["initialization_commands"], *config["setup_commands"]]
    assert any(c.startswith("test -w /shared/ssl2rl") for c in checks)


def test_ray_start_knows_every_option_that_the_files_use():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for file in FILES:
        for text in (file.read_text(), *ray_starts(file).values()):
            for line in text.replace("\\\n", " ").splitlines():
                if "ray start" in line or "-port=" in line:
                    code = line.split("#")[0]
                    words = [word.strip('"').split("=")[0] for word in code.split()]
                    used = {w for w in words if w.startswith("--")} - SRUN - {"--set"}
                    assert used <= known, (file.name, used - known)


SRUN = {"--nodes", "--ntasks", "--nodelist", "--overlap", "--exclude", "--ntasks-per-node"}


def test_the_rayjob_has_what_kuberay_requires():
    _, job = yaml.safe_load_all((ROOT / "deploy" / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) == {
        "submissionMode",
        "entrypoint",
        "runtimeEnvYAML",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "backoffLimit",
        "rayClusterSpec",
    }
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 60, 0)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert all("persistentVolumeClaim" in volume for volume in pod["volumes"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
    (worker,) = cluster["workerGroupSpecs"]
    assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["sh", "-c"] and len(words) == 3
    subprocess.run(["sh", "-n", "-c", words[2]], check=True)
    assert "sweep /opt/ssl2rl-ray/tune_configs/smoke.yaml" in words[2] and SMOKE.exists()
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"PYTHONUNBUFFERED": "1"}}


STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "hostname": "echo 127.0.0.1",
    "srun": r"""
        token=$(cat "$RAY_AUTH_TOKEN_PATH")
        echo "srun $* cpus=$SRUN_CPUS_PER_TASK mode=$RAY_AUTH_MODE token=$token" >>"$LOG"
        case "$*" in *"--head "*)
            port=$(sed 's/.*--port=\([0-9]*\).*/\1/' <<<"$*")
            exec "$PYTHON" -c "import socket, sys, time
s = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True: s.accept()" "$port";;
        *" --address="*) exec "$PYTHON" -c 'import time; time.sleep(100)';;
        esac""",
    "python": r"""
        case "$*" in
            -c*) exec "$PYTHON" "$@";;
            *" sweep "*)
                echo "python $* at=$RAY_ADDRESS" >>"$LOG"
                [[ $DRIVER == ends ]] && exit 3
                exec "$PYTHON" -c 'import time, sys
print("up", flush=True)
try: time.sleep(100)
except KeyboardInterrupt: sys.exit(130)';;
            *)  # the doctor, who waits for all nodes
                until grep -q -e " --address=" "$LOG"; do sleep 0.05; done
                echo "python $* at=$RAY_ADDRESS for=$SSL2RL_STORAGE" >>"$LOG";;
        esac""",
}


@pytest.fixture
def slurm(tmp_path) -> Iterator[dict[str, str]]:
    """An environment in which the Slurm script can be run on this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + text + "\n")
        (folder / name).chmod(0o755)
    yield {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
    }


def test_the_slurm_script_starts_ray_asks_the_doctor_and_ends_as_the_sweep_does(slurm, tmp_path):
    script, out = ROOT / "deploy" / "slurm.sbatch", tmp_path / "shared" / "smoke"
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    out.mkdir(parents=True)
    (out / "sweep.yaml").touch()
    ended = subprocess.run(
        ["bash", script, "smoke.yaml", out],
        env={**slurm, "DRIVER": "ends"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 3, ended.stderr
    head, worker, doctor, sweep, clean = Path(slurm["LOG"]).read_text().splitlines()
    assert "--nodelist=node1" in head and "--dashboard-host=127.0.0.1" in head
    assert "--nodes=1 --ntasks=1 --exclude=node1" in worker
    port = head.split(" --port=")[1].split()[0]
    assert f"--address=127.0.0.1:{port}" in worker
    for line in (head, worker):
        assert f"--temp-dir=/tmp/ray-{os.getpid()}" in line and "cpus=4 mode=token" in line
        assert len(line.split("token=")[1]) == 64
    assert f"doctor --nodes 2 at=127.0.0.1:{port} for={out.parent}" in doctor
    assert f"sweep smoke.yaml --out {out} --resume at=127.0.0.1:{port}" in sweep
    assert f"rm -rf /tmp/ray-{os.getpid()}" in clean
    assert [path.name for path in out.parent.iterdir()] == ["smoke"]  # the token is gone
    refused = subprocess.run(["bash", script, "smoke.yaml", "out"], env=slurm, capture_output=True)
    assert refused.returncode == 2 and b"not absolute" in refused.stderr


def test_the_slurm_script_hands_the_warning_of_the_time_limit_on(slurm, tmp_path):
    with subprocess.Popen(
        ["bash", ROOT / "deploy" / "slurm.sbatch", "smoke.yaml", tmp_path / "shared" / "smoke"],
        env={**slurm, "DRIVER": "waits"},
        stdout=subprocess.PIPE,
        text=True,
    ) as ran:
        assert ran.stdout is not None and ran.stdout.readline() == "up\n"
        ran.send_signal(signal.SIGINT)
        assert ran.wait(timeout=30) == 130


# ---- what a job sends ----------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_in(job) -> list[str]:
    with zipfile.ZipFile(job.archive) as archive:
        return archive.namelist()


def test_a_sweep_goes_in_one_archive_with_its_base_in_it(here):
    job = job_of(SMOKE, "/shared/x", overrides=["tune.max_concurrent=1"], resume=True)
    names = names_in(job)
    revision = git_revision(ROOT)
    assert [name for name in names if name.startswith(".")] == [".git/HEAD"] * bool(revision)
    assert {name.split("/")[0] for name in names} - {".git"} == {"configs", "envs", "ssl2rl_ray"}
    assert [name for name in names if name.startswith("configs/")] == ["configs/smoke.yaml"]
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    with zipfile.ZipFile(job.archive) as archive:
        assert yaml.safe_load(archive.read("configs/smoke.yaml"))["base"]["kind"] == "navigation"
        text = (ROOT / "ssl2rl_ray" / "submit.py").read_bytes()
        assert archive.read("ssl2rl_ray/submit.py") == text
    command = "python -m ssl2rl_ray sweep configs/smoke.yaml --resume --set tune.max_concurrent=1"
    assert shlex.join(job.entrypoint) == f"{command} --out /shared/x"
    assert (job.num_cpus, job.num_gpus, job.expected) == (0, 0, ())
    assert job.archive.parent == here / "runs" / "submitted"
    assert job.archive.stat().st_size < 2 * 2**20  # the whole of it
    again = job_of(SMOKE, "/shared/x", archive=here / "again.zip")
    assert again.archive.read_bytes() == job.archive.read_bytes()  # Ray takes it only once


def test_a_plain_ray_job_submit_of_the_checkout_is_small_too(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    assert {"ssl2rl_ray", "envs", "tune_configs"} <= names
    assert not names & {".git", ".rayignore", "tests", "docs", "benchmarks", "deploy", "runs"}
    assert (tmp_path / "package.zip").stat().st_size < 4 * 2**20


def test_a_run_takes_the_cpus_of_its_threads_and_a_sweep_none(here):
    config = here / "run.yaml"
    config.write_text("{kind: navigation, training: {num_torch_threads: 3}}")
    job = job_of(config, "/shared/x", num_gpus=0.5, python="python3")
    assert (job.num_cpus, job.num_gpus) == (3, 0.5)
    assert job.entrypoint[:4] == ("python3", "-m", "ssl2rl_ray", "run")
    assert job.entrypoint[4:] == ("configs/run.yaml", "--run-dir", "/shared/x")
    with pytest.raises(ValueError, match=r"tune\.num_gpus"):
        job_of(SMOKE, "/shared/x", num_gpus=1)


def test_relative_data_go_along_and_absolute_ones_are_expected_on_the_nodes(here):
    (here / "sets" / "one").mkdir(parents=True)
    (here / "sets" / "one" / "table").write_bytes(b"1234")
    (here / "sets" / "two").mkdir()
    (here / "run.yaml").write_text(
        "{kind: navigation, data: {train: [sets/./one, /data/far], calibration: /data/far}}"
    )
    job = job_of("run.yaml", "/shared/x")
    assert [name for name in names_in(job) if name.startswith("sets")] == ["sets/one/table"]
    assert job.sizes["sets/one"] == 4 and job.expected == ("/data/far",)
    assert "every node must have /data/far" in jobs.describe(job)
    for path, problem in (("../up", "below this folder"), ("gone", "there is no gone here")):
        (here / "run.yaml").write_text(f"{{kind: navigation, data: {{train: [{path}]}}}}")
        with pytest.raises(ValueError, match=problem):
            job_of("run.yaml", "/shared/x")


def test_nothing_leaves_that_is_hidden_or_only_linked_to(here):
    data = here / "sets" / "one"
    (data / "images").mkdir(parents=True)
    (data / "images" / "a").write_bytes(b"a")
    (data / ".git").mkdir()
    for secret in (here / "secret", data / ".env", data / ".git" / "config"):
        secret.write_text("secret")
    (data / "same").symlink_to("images/a")
    (data / "again").symlink_to("images")
    (here / "run.yaml").write_text("{kind: navigation, data: {train: [sets/one]}}")
    sent = [name for name in names_in(job_of("run.yaml", "/x")) if name.startswith("sets/")]
    assert sent == [f"sets/one/{name}" for name in ("again/a", "images/a", "same")]
    for target in ("../../secret", "../..", "gone", ".env", ".git/config", ".", "images/up"):
        (data / "images" / "up").symlink_to(".." if target == "images/up" else "a")
        (data / "link").symlink_to(target)
        with pytest.raises(ValueError, match=r"train: sets/one/.* is a link to .*put a copy"):
            job_of("run.yaml", "/x")
        (data / "link").unlink()
        (data / "images" / "up").unlink()


def test_every_field_that_names_a_file_is_looked_at():
    texts = set()

    def walk(cls, prefix=""):
        for field, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{field}.")
            elif hint in (str | None, tuple[str, ...]):
                texts.add(prefix + field)

    for cls in KINDS.values():
        walk(cls)
    others = {"data.validation_grids", "loop.methods", "env.tunables"}  # names
    others |= {"pretraining.pseudo_labels", "finetuning.pseudo_labels"}  # refused: made by the loop
    assert texts - others == set(jobs.PATHS)


def test_what_is_too_large_or_lost_is_refused_before_anything_is_sent(here, monkeypatch, capsys):
    with pytest.raises(ValueError, match="name an absolute folder"):
        job_of(SMOKE, "../x")
    with pytest.raises(ConfigError, match="unknown key"):
        job_of(SMOKE, "/shared/x", overrides=["base.trainign.num_env_steps=1"])
    monkeypatch.setattr(jobs, "LIMIT_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"to send, .* the largest: ssl2rl_ray \(\d"):
        job_of(SMOKE, "/shared/x")
    with pytest.raises(ValueError, match="name the --out to go on in"):
        job_of(SMOKE, resume=True)
    assert not (here / "runs").exists()
    assert main(["submit", str(SMOKE), "--dry-run"]) == 2
    assert "the largest: ssl2rl_ray" in capsys.readouterr().err


def test_a_relative_folder_is_below_the_storage_of_the_cluster_and_never_the_job_s_own(here):
    job = job_of(SMOKE, "some/name's", overrides=["tune.max_concurrent=1"], python="echo")
    assert "results: some/name's, below the cluster's storage_path" in jobs.describe(job)
    said = subprocess.run(job.entrypoint, env={"SSL2RL_STORAGE": "/a b"}, capture_output=True)
    words = (
        "-m ssl2rl_ray sweep configs/smoke.yaml --set tune.max_concurrent=1 --out /a b/some/name's"
    )
    assert said.stdout.decode().strip() == words
    refused = subprocess.run(job.entrypoint, env={}, capture_output=True)
    assert refused.returncode != 0 and b"name an absolute --out" in refused.stderr
    assert job_of(SMOKE).out.startswith("smoke-2")


def test_the_printed_line_is_what_ray_s_own_command_understands(here):
    from ray.dashboard.modules.job.cli import submit as ray_job_submit

    (here / "it's a run.yaml").write_text("kind: navigation")
    job = job_of("it's a run.yaml", "/shared/a b", overrides=["data.train=[]"], num_gpus=1)
    variable, *words = shlex.split(command_line(job, "http://127.0.0.1:8265"))
    assert (variable, words[:3]) == ("RAY_AUTH_MODE=token", ["ray", "job", "submit"])
    parsed = ray_job_submit.make_context("submit", words[3:]).params
    assert parsed["entrypoint"] == job.entrypoint
    assert parsed["working_dir"] == str(job.archive)
    assert parsed["entrypoint_num_cpus"] == job.num_cpus and parsed["entrypoint_num_gpus"] == 1
    assert json.loads(parsed["runtime_env_json"])["env_vars"] == {"PYTHONUNBUFFERED": "1"}


def test_a_dry_run_says_what_would_be_sent(here, capsys):
    argv = ["submit", str(SMOKE), "--out", "/shared/x", "--dry-run", "--json"]
    assert main(argv) == 0
    told = capsys.readouterr()
    assert "ssl2rl_ray 1." in told.err and "configs/smoke.yaml 0.0 MiB" in told.err
    assert json.loads(told.out)["command"].startswith("RAY_AUTH_MODE=token ray job submit")


# ---- the token, and how a job is followed --------------------------------------------------------


@pytest.fixture
def no_token(tmp_path, monkeypatch) -> Path:
    """A home without a token; returns where one would be."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def test_the_token_is_found_where_ray_finds_it(no_token, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ray get-auth-token"):
        read_token()
    no_token.parent.mkdir()
    no_token.write_text("of home\n")
    assert read_token() == "of home"
    (tmp_path / "file").write_text("of file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert read_token() == "of file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of variable")
    assert read_token() == "of variable"


@contextlib.contextmanager
def dashboard(mode: str | None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Something that answers as a dashboard does; its address, and the headers that it got.

    None = any other server: it knows no such page.
    """
    got: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(dict(self.headers))
            is_mode = self.path == "/api/authentication_mode"
            is_let_in = is_mode or self.headers.get("Authorization") == "Bearer right"
            body = {"authentication_mode": mode} if is_mode else {"ray_version": "2.60.0"}
            is_lost = is_mode and mode is None
            self.send_response(404 if is_lost else 200 if is_let_in else 403)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_cluster_that_asks_for_no_token_is_refused_and_gets_none(no_token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with dashboard("disabled") as (address, got):
        with pytest.raises(ValueError, match="runs what anybody sends it"):
            connect(address)
        assert not [headers for headers in got if "Authorization" in headers]
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(ValueError, match=r"was sent none.*unset RAY_AUTH_MODE"):
            connect(address)  # this stand-in wants one all the same
        assert not [headers for headers in got if "Authorization" in headers]


def test_a_server_that_is_no_dashboard_gets_no_token(no_token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with dashboard(None) as (address, got):
        with pytest.raises(ValueError, match="does not say that it is a Ray dashboard"):
            connect(address)
        assert len(got) == 1 and "Authorization" not in got[0]


def test_the_token_goes_to_who_asks_for_it_and_never_through_a_proxy(no_token, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with dashboard("token") as (address, got):
        with pytest.raises(ValueError, match="no token"):
            connect(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(ValueError, match="does not take this token"):
            connect(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        connect(address)
        assert got[-1]["Authorization"] == "Bearer right"


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "http://", "auto"])
def test_an_address_that_is_no_dashboard_s_is_told(address, no_token):
    with pytest.raises(ValueError, match="expected the dashboard's address"):
        connect(address)


def test_a_port_that_speaks_no_http_is_told(no_token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with socket.create_server(("127.0.0.1", 0)) as server:  # such as 6379

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"\0\0\6\4 no HTTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match="does not say that it is a Ray dashboard"):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_nobody_at_the_address_is_told(no_token):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ValueError, match="nobody answers"):
        connect(f"http://127.0.0.1:{port}")


class Client:
    """A job whose log stream breaks; ``ends`` is what Ray says of it when it is over."""

    def __init__(self, logs: list[str], ends: tuple[str, int | None]) -> None:
        self.logs, self.ends, self.num_tails = logs, ends, 0

    async def tail_job_logs(self, job_id: str):
        self.num_tails += 1
        for text in self.logs[: self.num_tails * 2]:
            yield text
        if self.num_tails * 2 < len(self.logs):
            raise RuntimeError("the connection was lost")

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        is_over = self.num_tails * 2 >= len(self.logs)
        name, code = self.ends if is_over else ("RUNNING", None)
        status = SimpleNamespace(value=name, is_terminal=lambda: is_over)
        return SimpleNamespace(status=status, driver_exit_code=code, message="why")


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (("SUCCEEDED", 0), 0),
        (("FAILED", 2), 2),
        (("FAILED", -9), 137),
        (("FAILED", None), 1),
        (("STOPPED", None), 1),
    ],
)
def test_logs_are_written_once_and_the_job_s_exit_code_is_ours(ends, code, monkeypatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    written: list[str] = []
    result = follow(Client(["one ", "two ", "three ", "four ", "five"], ends), "id", written.append)
    assert "".join(written) == "one two three four five"
    assert result["exit_code"] == code
    assert "why" in result["message"] or ends[1] is not None


@given(
    chunkings=st.lists(st.lists(st.integers(1, 5), max_size=6), max_size=4),
    text=st.text("ab\n", max_size=30),
)
def test_however_often_the_line_breaks_each_letter_of_the_logs_is_written_once(chunkings, text):
    """Each connection has chunks of its own and breaks after them; the last one says all."""
    connections = iter(chunkings)

    class Breaking:
        is_over = False

        async def tail_job_logs(self, job_id: str):
            begin, sizes = 0, next(connections, None)
            for size in sizes or ():
                yield text[begin : begin + size]
                begin += size
            if sizes is not None:
                raise RuntimeError("the connection was lost")
            yield text[begin:]
            self.is_over = True

        def get_job_info(self, job_id: str) -> SimpleNamespace:
            status = SimpleNamespace(value="SUCCEEDED", is_terminal=lambda: self.is_over)
            return SimpleNamespace(status=status, driver_exit_code=0, message="")

    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.time, "sleep", lambda seconds: None)
        assert follow(Breaking(), "id", written.append)["exit_code"] == 0
    assert "".join(written) == text


def test_a_line_that_breaks_as_the_job_ends_costs_no_log(monkeypatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    tails = iter([("one ", True), ("one two ", True), ("one two three", False)])
    over = SimpleNamespace(value="SUCCEEDED", is_terminal=lambda: True)
    infos = iter([None, SimpleNamespace(status=over, driver_exit_code=0, message="")])

    class Breaking:
        async def tail_job_logs(self, job_id: str):
            text, is_cut = next(tails)
            yield text
            if is_cut:
                raise aiohttp.ServerDisconnectedError

        def get_job_info(self, job_id: str) -> SimpleNamespace:
            if (info := next(infos)) is None:
                raise RuntimeError("Request failed with status code 503")
            return info

    written: list[str] = []
    assert follow(Breaking(), "id", written.append)["exit_code"] == 0
    assert "".join(written) == "one two three"


def test_a_cluster_that_answers_with_errors_alone_is_out_of_reach_in_the_end(monkeypatch):
    monkeypatch.setattr(jobs, "_PATIENCE_S", -1.0)

    class Failing:
        async def tail_job_logs(self, job_id: str):
            raise aiohttp.ServerDisconnectedError
            yield

        def get_job_info(self, job_id: str) -> SimpleNamespace:
            raise RuntimeError("Request failed with status code 503")

    with pytest.raises(OSError, match="503"):
        follow(Failing(), "id", print)


class Silent:
    """A job whose log stream says nothing until something was written, or never."""

    def __init__(self, written: list[str], states: list[str], speaks: bool) -> None:
        self.written, self.states, self.speaks = written, states, speaks

    async def tail_job_logs(self, job_id: str):
        while not (self.speaks and self.written):
            await jobs.asyncio.sleep(0.01)
        yield "begun"

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        name = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        status = SimpleNamespace(value=name, is_terminal=lambda: name == "SUCCEEDED")
        return SimpleNamespace(status=status, driver_exit_code=0, message="no node is free")


def test_a_job_that_waits_for_a_place_is_told_and_a_dead_line_does_not_hang(monkeypatch):
    monkeypatch.setattr(jobs, "_SILENCE_S", 0.1)
    written: list[str] = []
    follow(Silent(written, ["PENDING", "SUCCEEDED"], speaks=True), "id", written.append)
    assert written == ["still waiting for a place: no node is free\n", "begun"]
    silent = Silent(written, ["RUNNING", "RUNNING", "SUCCEEDED"], speaks=False)
    assert follow(silent, "id", written.append)["status"] == "SUCCEEDED"
    assert len(written) == 2


def test_who_stops_following_learns_how_to_go_on(here, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "connect", lambda address: None)
    monkeypatch.setattr(jobs, "submit", lambda job, client: "raysubmit_1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    argv = ["submit", str(SMOKE), "--out", "/shared/x"]
    hint = "RAY_AUTH_MODE=token ray job logs --follow --address http://127.0.0.1:8265 raysubmit_1"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def lost(*_: object) -> None:
        raise ConnectionError("gone")

    for ends, code in ((interrupted, 130), (lost, 1)):
        monkeypatch.setattr(jobs, "follow", ends)
        assert main(argv) == code
        told = capsys.readouterr().err
        assert "the job goes on" in told and hint in told and "ray job stop" in told
    assert main([*argv, "--no-wait"]) == 0
    assert hint in capsys.readouterr().out


# ---- what the doctor says ------------------------------------------------------------------------

HEALTHY = {
    "host": "a",
    "node": "id-a",
    "python": "3.11.7",
    "ray": "2.60.0",
    "gymnasium": "1.2.2",
    "tensorboard": "2.21",
    "installed": None,
    "code": "0123",
    "torch": {"version": "2.13", "gpu": None},
    "navigation_s": 0.1,
    "tuning_s": 0.1,
    "crystfel": None,
    "auth": "token",
    "token_mode": "own",
    "num_files": 65536,
    "shm_bytes": 8 * 2**30,
    "temp_free_share": 0.5,
    "memory": {"total": 16 * 2**30, "free": 8 * 2**30},
    "num_cpus": 4.0,
    "num_gpus": 0,
    "object_store_bytes": 2**30,
    "storage": {"name": "id-a", "unseen": [], "seen_after_s": 0.0},
}
OTHER = {**HEALTHY, "host": "b", "node": "id-b"}


def not_ok(*args, **kwargs) -> list[tuple[str, str]]:
    report = {"where": "here", "num_problems": 0, "num_warnings": 0}
    findings = judge(*args, **kwargs)
    text = format_report({**report, "findings": [dataclasses.asdict(f) for f in findings]})
    assert all(f.text in text and f.advice in text for f in findings)
    assert all(f.advice for f in findings if f.status != "ok")
    return [(f.what, f.status) for f in findings if f.status != "ok"]


def test_a_healthy_cluster_has_nothing_to_mind():
    assert not_ok([HEALTHY, OTHER], "/shared", 2, "127.0.0.1:8265", "token") == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"python": "3.12.1"}, ("python", "problem")),
        ({"ray": "2.59.0"}, ("ray", "problem")),
        ({"torch": {"error": "ImportError: libcudart"}}, ("torch", "problem")),
        ({"gymnasium": None}, ("gymnasium", "problem")),
        ({"code": "4567"}, ("our code", "problem")),
        ({"code": {"error": "ModuleNotFoundError: envs"}}, ("our code", "problem")),
        ({"auth": None}, ("token", "warning")),
        ({"token_mode": "others"}, ("token", "warning")),
        ({"storage": {"error": "cannot be written"}}, ("storage", "problem")),
        ({"storage": {"name": "id-b", "unseen": ["id-a"]}}, ("storage", "problem")),
        ({"navigation_s": {"error": "KeyError"}}, ("cryo-EM env", "problem")),
        ({"tuning_s": {"error": "KeyError"}}, ("CrystFEL env", "problem")),
        ({"num_gpus": 1.0}, ("GPU", "problem")),
        ({"memory": {"total": 2**30, "free": 2**30}}, ("memory", "warning")),
        ({"shm_bytes": 2**26}, ("object store", "warning")),
        ({"num_files": 1024}, ("open files", "warning")),
        ({"temp_free_share": 0.01}, ("disk", "warning")),
        ({"tensorboard": None}, ("TensorBoard", "warning")),
    ],
)
def test_each_fault_of_one_node_is_one_line_that_says_what_to_do(change, expected):
    nodes = [HEALTHY, {**OTHER, **change}]
    assert not_ok(nodes, "/shared", 2, "127.0.0.1:8265", "token") == [expected]


def test_a_doctor_whose_job_cannot_run_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(doctors, "connect", lambda address: None)
    monkeypatch.setattr(doctors, "submit", lambda job, client: "id")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").touch(mode=0o644)
    logs = "2026-11-22 job_manager.py\nNo module named ray\n"

    def follow(client, job_id, write):
        write(logs)
        return {"status": "FAILED", "exit_code": 1, "message": "FAILED, exit code 1"}

    monkeypatch.setattr(doctors, "follow", follow)
    report = doctor("http://127.0.0.1:1")
    token, job = report["findings"]
    assert (token["what"], token["status"]) == ("token", "warning")
    assert "can be read by others" in token["text"]
    assert job["status"] == "problem" and "No module named ray" in job["text"]
    logs += '{\n "where": "there", "nodes": [], "findings": []\n}\nand more\n'
    assert doctor("http://127.0.0.1:1")["num_problems"] == 0


def test_a_python_of_no_nodes_is_refused(capsys):
    assert main(["doctor", "--python", "python3"]) == 2
    assert "--python is of the nodes behind --address" in capsys.readouterr().err


def test_the_doctor_needs_no_dashboard_on_its_own_node(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(doctors, "local_ray", lambda num_cpus: contextlib.nullcontext())
    monkeypatch.setattr(doctors, "look", lambda *_: ("here", [HEALTHY], f"127.0.0.1:{port}"))
    assert doctor(storage="/shared")["num_problems"] == 0


def test_a_node_says_what_is_judged_and_finds_crystfel(tmp_path, monkeypatch):
    (tmp_path / "indexamajig").write_text("#!/bin/sh\necho CrystFEL: 0.11.1\n")
    (tmp_path / "indexamajig").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = doctors._describe_node()
    added = {"node", "num_cpus", "num_gpus", "object_store_bytes", "storage"}  # by look
    assert set(facts) | added == set(HEALTHY)
    assert facts["crystfel"] == f"{tmp_path}/indexamajig (CrystFEL: 0.11.1)"
    whole = {**HEALTHY, **facts, "auth": "token", "token_mode": "own"}
    assert not [line for line in not_ok([whole], "/shared") if line[1] == "problem"]


def test_a_folder_that_is_not_the_others_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctors, "_SEEN_S", 0.0)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "a").write_text("a")
    found = doctors._read_probe(str(tmp_path / "probe"), ["a", "b"])
    assert found["unseen"] == ["b"]
    assert doctors._read_probe(str(tmp_path / "no" / "probe"), ["a"])["unseen"] == ["a"]


def test_faults_of_the_whole_cluster_are_told_too():
    nodes = [HEALTHY, OTHER]
    assert not_ok(nodes, "/shared", 3) == [("nodes", "problem")]
    assert not_ok(nodes, None) == [("storage", "warning")]
    assert not_ok(nodes, "/shared", dashboard="10.0.0.1:8265") == [("dashboard", "warning")]
    assert not_ok(nodes, "/shared", mode="disabled") == [("token", "problem")]
    silent = {"host": "c", "node": "id-c", "error": "GetTimeoutError: 180 s"}
    assert not_ok([*nodes, silent], "/shared") == [("nodes", "problem")]
    found = judge([{**HEALTHY, "crystfel": "/bin/x (CrystFEL: 0.11.1)"}])
    assert "0.11.1" in next(f.text for f in found if f.what == "CrystFEL")


# ---- a real cluster of two nodes -----------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in taken]


@dataclasses.dataclass
class Cluster:
    address: str
    agents: tuple[str, ...]
    """Of each node: where its agent listens, on all interfaces; the head's takes jobs, too."""
    env: dict[str, str]
    folder: Path

    @contextlib.contextmanager
    def ssl2rl(self, *words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [sys.executable, "-m", "ssl2rl_ray", *words],
            cwd=self.folder,
            env={**self.env, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, started by the commands of cluster.yaml with ports and folders of their own."""
    folder = Path(tempfile.mkdtemp(prefix="s2r"))  # short: paths of sockets have at most 107 bytes
    (folder / "results").mkdir()
    starts = {
        node: start.replace("/shared/ssl2rl", f"{folder}/results")
        for node, start in ray_starts(ROOT / "cluster.yaml").items()
    }
    gcs, web, client, *ports = free_ports(13)
    head_ports, worker_ports = ports[:5], ports[5:]
    (folder / ".ray").mkdir()
    token = folder / ".ray" / "auth_token"
    token.touch(mode=0o600)
    token.write_text(os.urandom(32).hex())
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST"))}
    env |= {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "RAY_HEAD_IP": "127.0.0.1",
    }

    def started(node: str, own_ports: list[int], *more: str) -> subprocess.Popen[bytes]:
        names = (
            "object-manager node-manager runtime-env-agent metrics-export dashboard-agent-listen"
        )
        options = [f"--{n}-port={p}" for n, p in zip(names.split(), own_ports, strict=False)]
        options += ["--min-worker-port=0", "--max-worker-port=0", "--num-cpus=1", "--block"]
        options += [f"--temp-dir={folder / node}", "--object-store-memory=100000000", *more]
        command = starts[node].replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
        log = (folder / f"{node}.log").open("wb")
        process = subprocess.Popen(  # the last of equal options counts
            ["bash", "-c", f"{command} {shlex.join(options)}"],
            env=env,
            cwd=folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        deadline = time.monotonic() + 60
        while b"Ray runtime started" not in (text := (folder / f"{node}.log").read_bytes()):
            assert process.poll() is None and time.monotonic() < deadline, text.decode()
            time.sleep(0.1)
        return process

    processes = []
    try:
        more = f"--port={gcs} --dashboard-port={web} --ray-client-server-port={client}"
        processes.append(started("head", head_ports, *more.split()))
        processes.append(started("worker", worker_ports, f"--address=127.0.0.1:{gcs}"))
        agents = tuple(f"http://127.0.0.1:{p[4]}" for p in (head_ports, worker_ports))
        yield Cluster(f"http://127.0.0.1:{web}", agents, env, folder)
    finally:
        for process in reversed(processes):
            process.terminate()  # `ray start --block` ends what it started
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
        for pid in [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]:
            with contextlib.suppress(OSError):
                if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jobs_on_two_nodes_end_as_they_should_and_the_doctor_finds_them_well(cluster):
    """At once, to save time: the smoke sweep, a job that fails, and the doctor."""
    bad = cluster.folder / "bad.yaml"
    bad.write_text(
        "{kind: navigation, data: {train: [/not/there]}, training: {num_torch_threads: 1}}"
    )
    results = cluster.folder / "results"  # the cluster's storage_path
    to = ("--address", cluster.address)
    with (
        cluster.ssl2rl("submit", str(SMOKE), *to, "--out", "smoke") as sweep,
        cluster.ssl2rl("submit", str(bad), *to, "--out", str(results / "bad")) as failing,
        cluster.ssl2rl("doctor", *to, "--storage", str(results), "--nodes", "2", "--json") as well,
    ):
        said = {
            name: process.communicate(timeout=280)[0]
            for name, process in (("failing", failing), ("well", well), ("sweep", sweep))
        }

    assert sweep.returncode == 0, said["sweep"]
    assert "2 of 2 trials finished" in said["sweep"]
    (sent,) = (cluster.folder / "runs" / "submitted").glob("smoke-*.zip")
    with zipfile.ZipFile(sent) as archive:
        is_checkout = ".git/HEAD" in archive.namelist()
        revision = archive.read(".git/HEAD").decode() if is_checkout else None
    for seed in (0, 1):
        manifest = json.loads((results / "smoke" / f"seed-{seed}" / "manifest.json").read_text())
        assert manifest["status"] == "finished" and len(manifest["attempts"]) == 1
        assert manifest["git_revision"] == revision

    assert failing.returncode == 2, said["failing"]
    assert "/not/there" in said["failing"] and "FAILED, exit code 2" in said["failing"]

    report = json.loads(said["well"])
    assert (well.returncode, report["num_problems"]) == (0, 0), said["well"]
    assert len({facts["node"] for facts in report["nodes"]}) == 2
    found = {finding["what"]: finding["text"] for finding in report["findings"]}
    assert "made and stepped on a worker of 2 of 2 nodes" in found["cryo-EM env"]
    assert found["storage"].startswith(f"{results}: written on 2 and read on 2 nodes")
    assert found["token"] == "asked for" and "loopback" in found["dashboard"]
    assert [path.name for path in results.iterdir()] == ["smoke"]  # the doctor tidies up


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_without_the_token_is_refused_by_a_cluster_that_our_files_started(cluster):
    import urllib.error
    import urllib.request

    body = json.dumps({"entrypoint": f"touch {cluster.folder}/taken"}).encode()
    browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    doors = [f"{cluster.address}/api/jobs/", *(f"{a}/api/job_agent/jobs/" for a in cluster.agents)]
    tries = (({}, 401), ({"Authorization": "Bearer " + "0" * 64}, 403))
    for door, (headers, status) in itertools.product(doors, tries):
        json_headers = {"Content-Type": "application/json", **headers}
        with pytest.raises(urllib.error.HTTPError) as refused:
            browser.open(urllib.request.Request(door, body, json_headers), timeout=30)
        assert refused.value.code == status
        refused.value.close()
    ray_job = subprocess.run(
        ["ray", "job", "submit", "--address", cluster.address, "--", "touch", "taken"],
        env={**cluster.env, "HOME": "/nonexistent", "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ray_job.returncode != 0 and "Authentication required" in ray_job.stderr
    words = ("submit", str(SMOKE), "--address", cluster.address, "--out", "/x")
    with cluster.ssl2rl(*words, HOME="/nonexistent") as ours:
        assert "no token" in ours.communicate(timeout=60)[0] and ours.returncode == 2
    assert not (cluster.folder / "taken").exists()
    port = int(cluster.address.rsplit(":", 1)[1])
    others = [a[4][0] for a in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)]
    for other in set(others) - {"127.0.0.1", "127.0.1.1"}:  # from another machine: nobody there
        with pytest.raises(OSError):
            socket.create_connection((str(other), port), timeout=5)
