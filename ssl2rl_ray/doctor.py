"""Whether a machine or a cluster is fit for runs: each finding says what it means and what to do.

``look`` asks every node by a task pinned to it; ``judge`` turns what they said into findings and
needs no Ray. A cluster behind a dashboard's address is asked by a job that runs this on its head.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.submit import (
    authentication_mode,
    connect,
    follow,
    is_loopback,
    job_of_command,
    submit,
    token_file,
)

Status = Literal["ok", "warning", "problem"]
Facts = Mapping[str, Any]
_GIB = 2**30
_ANSWER_S = 180.0
"""What a node's answer may take; the first import of torch from a network disk is slow."""
_COME_S = 300.0
"""What nodes that should be there may take to come."""
_SEEN_S = 30.0
"""What a file may take to be seen on other nodes: NFS remembers folders for a while."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    status: Status
    text: str
    advice: str = ""


def doctor(
    address: str | None = None,
    *,
    storage: str | None = None,
    num_nodes: int | None = None,
    python: str | None = None,
) -> dict[str, Any]:
    """Examines a cluster, or this machine.

    Args:
        address: the dashboard of a cluster; None = the cluster of RAY_ADDRESS, else this machine.
        storage: folder for results, which every node must see; None = the cluster's storage_path
            (SSL2RL_STORAGE), if it has one.
        num_nodes: that there should be; waited for.
        python: how the nodes of ``address`` call theirs; None = ``python``.

    Returns:
        ``where``, ``nodes`` (what each said), ``findings``, ``num_problems``, ``num_warnings``.

    Raises:
        ValueError: nobody at the address, or no token for it (see ``submit.connect``); ``python``
            without ``address``.
    """
    if address is not None:
        return _by_job(address, storage, num_nodes, python or "python")
    if python is not None:
        raise ValueError(
            "--python is of the nodes behind --address, and none is named; this machine answers "
            "by the Python that runs this command"
        )
    storage = storage or os.environ.get("SSL2RL_STORAGE")
    with local_ray(2):
        where, nodes, dashboard = look(storage, num_nodes)
        mode = None
        if dashboard:
            with contextlib.suppress(OSError):  # it is on loopback, of another node
                mode = authentication_mode(f"http://{dashboard}")
    return _report(where, nodes, judge(nodes, storage, num_nodes, dashboard, mode))


def _report(where: str, nodes: Sequence[Facts], findings: Sequence[Finding]) -> dict[str, Any]:
    counts = {f"num_{s}s": sum(f.status == s for f in findings) for s in ("problem", "warning")}
    return {"where": where, "nodes": list(nodes), "findings": [*map(asdict, findings)], **counts}


def format_report(report: Mapping[str, Any]) -> str:
    """The report in lines."""
    lines = [f"{report['where']}:"]
    for finding in report["findings"]:
        lines.append(f"{finding['status']:<8} {finding['what']:<13} {finding['text']}")
        lines += [f"{'':<22} -> {finding['advice']}"] * bool(finding["advice"])
    problems, warnings = report["num_problems"], report["num_warnings"]
    lines.append(f"{problems} problem{'s' * (problems != 1)}, {warnings} to mind")
    return "\n".join(lines)


def _by_job(
    address: str, storage: str | None, num_nodes: int | None, python: str
) -> dict[str, Any]:
    client = connect(address)
    words = ["doctor", "--json"]
    words += [] if storage is None else ["--storage", storage]
    words += [] if num_nodes is None else ["--nodes", str(num_nodes)]
    written: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        job = job_of_command(words, python=python, archive=Path(folder) / "doctor.zip")
        ended = follow(client, submit(job, client), written.append)
    logs = "".join(written)
    with contextlib.suppress(ValueError, KeyError):
        report, _ = json.JSONDecoder().raw_decode(logs, logs.index("\n{\n") + 1)
        findings = [Finding(**finding) for finding in report["findings"]]
        return _report(f"{address}, {report['where']}", report["nodes"], [*_here(), *findings])
    finding = Finding(
        what="job",
        status="problem",
        text=f"could not be run: {ended['message']}: {logs[-600:].strip()}",
        advice="the nodes need Ray and what this program depends on in one Python, which the shell "
        "of a job calls `python` (or name it: --python)",
    )
    return _report(address, [], [*_here(), finding])


def _here() -> Iterator[Finding]:
    """Of the machine that submits."""
    if not os.environ.get("RAY_AUTH_TOKEN"):
        yield from _token_findings({"this machine": _token_mode(token_file())})


# ---- what the nodes say --------------------------------------------------------------------------


def look(
    storage: str | None = None, num_nodes: int | None = None
) -> tuple[str, list[dict[str, Any]], str | None]:
    """Asks every node of the Ray that is connected.

    Returns:
        What was looked at, in words; what each node said, or ``error``; where the dashboard listens
        (host:port), None = there is none.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    deadline = time.monotonic() + _COME_S
    while num_nodes and sum(n["Alive"] for n in ray.nodes()) < num_nodes:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    alive = [node for node in ray.nodes() if node["Alive"]]

    def on_each(task: Callable[..., dict[str, Any]], *args: Any) -> list[dict[str, Any]]:
        remote = ray.remote(num_cpus=0, max_retries=0)(task)
        asked = [
            remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(*args)
            for node in alive
        ]
        ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S)
        answers = []
        for node, answer in zip(alive, asked, strict=True):
            try:
                answers.append(ray.get(answer, timeout=0.1))
            except Exception as error:
                reason = str(error).strip().splitlines()[-1:] or [""]
                answers.append({"error": f"{type(error).__name__}: {reason[0]}"})
            answers[-1].setdefault("host", node["NodeManagerHostname"])
        return answers

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # nodes that lack our code can say so
    try:
        nodes = on_each(_describe_node)
        for node, facts in zip(alive, nodes, strict=True):
            facts["node"] = node["NodeID"]
            for name, key in (
                ("num_cpus", "CPU"),
                ("num_gpus", "GPU"),
                ("object_store_bytes", "object_store_memory"),
            ):
                facts[name] = node["Resources"].get(key, 0)
        if storage is not None:
            probe = str(Path(storage) / f".ssl2rl-doctor-{secrets.token_hex(6)}")
            written = on_each(_write_probe, probe)
            names = [answer["name"] for answer in written if "name" in answer]
            read = on_each(_read_probe, probe, names)
            on_each(_remove_probe, probe)
            for facts, first, second in zip(nodes, written, read, strict=True):
                facts["storage"] = {**first, **second}
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    where = f"Ray {ray.__version__} on {len(alive)} node" + "s" * (len(alive) != 1)
    return where, nodes, _dashboard()


def _dashboard() -> str | None:
    """host:port of the dashboard of the cluster that is connected."""
    from ray._private.services import get_webui_url_from_internal_kv  # Ray has no public word

    return get_webui_url_from_internal_kv() or None


def _describe_node() -> dict[str, Any]:
    """One node; whatever is missing there is told and not raised."""
    import platform
    import resource
    import shutil
    import socket
    import tempfile
    from importlib.metadata import PackageNotFoundError, version

    import ray

    def tried(what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def code() -> str:
        import hashlib

        import envs
        import ssl2rl_ray

        digest = hashlib.sha256()
        for package in (envs, ssl2rl_ray):
            root = Path(package.__path__[0])
            for path in sorted(root.rglob("*.py")):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
        return digest.hexdigest()[:12]

    def navigation() -> float:
        import numpy as np

        from envs.cryoem.env import CryoEMNavigationEnv
        from envs.cryoem.synthetic import draw_session
        from envs.cryoem.types import NavigationConfig

        begin = time.perf_counter()
        table = draw_session(np.random.default_rng(0), "demo")
        env = CryoEMNavigationEnv(table, NavigationConfig.preset("paper"))
        env.reset(seed=0)
        env.step(int(np.flatnonzero(env.action_mask())[0]))
        return time.perf_counter() - begin

    def tuning() -> float:
        from envs.crystfel.env import CrystFELVectorEnv
        from envs.crystfel.types import TuningConfig

        begin = time.perf_counter()
        env = CrystFELVectorEnv(TuningConfig(), 2, pool_size=2, seed=0)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        return time.perf_counter() - begin

    def torch_build() -> dict[str, Any]:
        import torch

        gpu = torch.version.cuda or getattr(torch.version, "hip", None)
        return {"version": torch.__version__, "gpu": gpu}

    def crystfel() -> str | None:
        from envs.crystfel.indexamajig import call

        if (found := shutil.which("indexamajig")) is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            log = call((found, "--version"), Path(folder), Path(folder), timeout_s=30.0).log
        return f"{found} ({log.strip().splitlines()[0] if log.strip() else 'says no version'})"

    def memory() -> dict[str, int]:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return {"total": sizes["MemTotal"], "free": sizes["MemAvailable"]}

    def token() -> str | None:
        file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        return None if os.environ.get("RAY_AUTH_TOKEN") else _token_mode(Path(file))

    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "gymnasium": version_of("gymnasium"),
        "tensorboard": version_of("tensorboard"),
        "installed": version_of("ssl2rl-ray"),
        "code": tried(code),
        "torch": tried(torch_build),
        "navigation_s": tried(navigation),
        "tuning_s": tried(tuning),
        "crystfel": tried(crystfel),
        "auth": os.environ.get("RAY_AUTH_MODE"),
        "token_mode": tried(token),
        "num_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm_bytes": tried(lambda: shutil.disk_usage("/dev/shm").total),
        "temp_free_share": tried(
            lambda: (usage := shutil.disk_usage(tempfile.gettempdir())).free / usage.total
        ),
        "memory": tried(memory),
    }


def _token_mode(file: Path) -> str | None:
    """Who may read a token: ``own`` or ``others``; None = there is no such file."""
    try:
        return "others" if stat.S_IMODE(file.stat().st_mode) & 0o077 else "own"
    except OSError:
        return None


def _write_probe(folder: str) -> dict[str, Any]:
    """Leaves a file of this node's name in the folder, which it makes."""
    import ray

    name = ray.get_runtime_context().get_node_id()
    try:
        if not Path(folder).parent.is_dir():
            return {"error": f"there is no folder {Path(folder).parent}"}
        Path(folder).mkdir(exist_ok=True)
        Path(folder, name).write_text(name)
        os.sync()
    except OSError as error:
        return {"error": f"cannot be written: {error}"}
    return {"name": name}


def _read_probe(folder: str, names: Sequence[str]) -> dict[str, Any]:
    """Which files of the others are seen here, and after how long."""
    begin = time.monotonic()
    missing = set(names)
    while True:
        for name in list(missing):
            with contextlib.suppress(OSError):
                if Path(folder, name).read_text() == name:
                    missing.discard(name)
        waited_s = time.monotonic() - begin
        if not missing or waited_s > _SEEN_S or not Path(folder).parent.is_dir():
            return {"unseen": sorted(missing), "seen_after_s": round(waited_s, 1)}
        time.sleep(0.5)


def _remove_probe(folder: str) -> dict[str, Any]:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return {}


# ---- what that means -----------------------------------------------------------------------------


def judge(
    nodes: Sequence[Facts],
    storage: str | None = None,
    num_nodes: int | None = None,
    dashboard: str | None = None,
    mode: str | None = None,
) -> list[Finding]:
    """Findings of what the nodes said (``look``), in the order of how much hangs on them.

    Args:
        nodes: of each node.
        storage: that was asked for; None = it was not looked at.
        num_nodes: that there should be.
        dashboard: where it listens, host:port; None = there is none.
        mode: what it asks for, ``token`` or ``disabled``; None = it did not say.
    """
    silent = [facts for facts in nodes if "error" in facts]
    nodes = [facts for facts in nodes if "error" not in facts]
    return [
        *_node_findings(nodes, silent, num_nodes),
        *_version_findings(nodes),
        *_auth_findings(nodes, dashboard, mode),
        *_storage_findings(nodes, storage),
        *_env_findings(nodes),
        *_size_findings(nodes),
        *_tool_findings(nodes),
    ]


def _node_findings(
    nodes: Sequence[Facts], silent: Sequence[Facts], num_nodes: int | None
) -> Iterator[Finding]:
    for facts in silent:
        yield Finding(
            what="nodes",
            status="problem",
            text=f"{facts['host']} does not answer: {facts['error']}",
            advice="see its logs (/tmp/ray/session_latest/logs) and whether the ports between the "
            "nodes are open",
        )
    found = len(nodes) + len(silent)
    cpus, gpus = (sum(f[name] for f in nodes) for name in ("num_cpus", "num_gpus"))
    is_short = num_nodes is not None and found < num_nodes
    yield Finding(
        what="nodes",
        status="problem" if is_short or not nodes else "ok",
        text=f"{len(nodes)} of {max(found, num_nodes or 0)} answer, with {cpus:g} CPUs and "
        f"{gpus:g} GPUs",
        advice="start the missing ones with `ray start --address=HEAD:6379`" if is_short else "",
    )


def _version_findings(nodes: Sequence[Facts]) -> Iterator[Finding]:
    for what, of in (
        ("python", lambda f: f["python"]),
        ("ray", lambda f: f["ray"]),
        ("torch", lambda f: f["torch"].get("version", "missing")),
        ("gymnasium", lambda f: f["gymnasium"] or "missing"),
        ("our code", lambda f: f["code"] if isinstance(f["code"], str) else "missing"),
    ):
        by_version = _by(nodes, of)
        if "missing" in by_version:
            is_ours = what == "our code"
            yield Finding(
                what=what,
                status="problem",
                text=f"cannot be imported on {_names(by_version['missing'])}",
                advice="pip install this checkout there"
                + (", or use `ssl2rl submit`, which sends it" if is_ours else ""),
            )
        elif len(by_version) > 1:
            spread = ", ".join(f"{v} on {_names(on)}" for v, on in by_version.items())
            yield Finding(
                what=what,
                status="problem",
                text=f"not the same on every node: {spread}",
                advice="install the same on all of them (ssl2rl submit sends our code to all)"
                if what == "our code"
                else "install the same on all of them",
            )
        else:
            yield from (
                Finding(what=what, status="ok", text=f"{version}{_everywhere(nodes)}")
                for version in by_version
            )


def _auth_findings(
    nodes: Sequence[Facts], dashboard: str | None, mode: str | None
) -> Iterator[Finding]:
    open_nodes = [f["host"] for f in nodes if (f["auth"] or "disabled").lower() != "token"]
    if mode == "disabled" or (mode is None and open_nodes):
        yield Finding(
            what="token",
            status="problem",
            text="the cluster runs what anybody sends it who reaches its ports",
            advice="start every process of it with RAY_AUTH_MODE=token (cluster.yaml and deploy/ "
            "do)",
        )
    elif open_nodes:
        yield Finding(
            what="token",
            status="warning",
            text=f"RAY_AUTH_MODE is not set on {_names(open_nodes)}, though the head asks for one",
            advice="set RAY_AUTH_MODE=token for every process",
        )
    else:
        yield Finding(what="token", status="ok", text="asked for")
    yield from _token_findings({f["host"]: f["token_mode"] for f in nodes})
    if dashboard is None:
        return
    is_near = is_loopback(f"http://{dashboard}")
    yield Finding(
        what="dashboard",
        status="ok" if is_near else "warning",
        text=f"listens on {dashboard}" + (", loopback" if is_near else ": others can reach it"),
        advice=""
        if is_near
        else "start the head with --dashboard-host=127.0.0.1 and go through ssh -L "
        f"8265:127.0.0.1:{urlsplit(f'http://{dashboard}').port} (in Kubernetes: a NetworkPolicy)",
    )


def _token_findings(mode_by_host: Mapping[str, Any]) -> Iterator[Finding]:
    if hosts := [host for host, mode in mode_by_host.items() if mode == "others"]:
        yield Finding(
            what="token",
            status="warning",
            text=f"the file with it can be read by others on {_names(hosts)} (Ray makes it so)",
            advice="chmod 600 ~/.ray/auth_token (or the file of RAY_AUTH_TOKEN_PATH)",
        )


def _storage_findings(nodes: Sequence[Facts], storage: str | None) -> Iterator[Finding]:
    if storage is None:
        yield Finding(
            what="storage",
            status="warning",
            text="not looked at",
            advice="--storage DIR: the folder for results, which every node must see (or set "
            "SSL2RL_STORAGE where Ray is started)",
        )
        return
    name_of = {facts["node"]: facts["host"] for facts in nodes}
    broken = [facts for facts in nodes if "error" in facts["storage"]]
    for error, hosts in _by(broken, lambda f: f["storage"]["error"]).items():
        yield Finding(
            what="storage",
            status="problem",
            text=f"{storage} on {_names(hosts)}: {error}",
            advice="mount the shared folder there, writable for the user that Ray runs as",
        )
    apart = [facts for facts in nodes if facts["storage"].get("unseen")]
    for facts in apart:
        others = _names([name_of.get(name, name) for name in facts["storage"]["unseen"]])
        yield Finding(
            what="storage",
            status="problem",
            text=f"{storage} on {facts['host']} is not that on {others}: what is written there "
            "is not seen here",
            advice="mount one shared folder (NFS, GPFS, Lustre) under this name on every node",
        )
    slowest = max((f["storage"].get("seen_after_s", 0) for f in nodes), default=0)
    if not broken and not apart and nodes:
        yield Finding(
            what="storage",
            status="ok",
            text=f"{storage}: written on {len(nodes)} and read on {len(nodes)} nodes, seen by all "
            f"after {slowest:g} s",
        )


def _env_findings(nodes: Sequence[Facts]) -> Iterator[Finding]:
    for what, key in (("cryo-EM env", "navigation_s"), ("CrystFEL env", "tuning_s")):
        bad = [f for f in nodes if isinstance(f[key], Mapping)]
        for error, hosts in _by(bad, lambda f, key=key: f[key]["error"]).items():
            yield Finding(
                what=what,
                status="problem",
                text=f"cannot be made on {_names(hosts)}: {error}",
                advice="pip install this checkout there; if it is: please report this",
            )
        if not bad and nodes:
            slowest = max(f[key] for f in nodes)
            yield Finding(
                what=what,
                status="ok",
                text=f"made and stepped on a worker of {len(nodes)} of {len(nodes)} nodes, in at "
                f"most {slowest:.2f} s",
            )


def _size_findings(nodes: Sequence[Facts]) -> Iterator[Finding]:
    no_gpu = [f["host"] for f in nodes if f["num_gpus"] and not f["torch"].get("gpu")]
    if no_gpu:
        yield Finding(
            what="GPU",
            status="problem",
            text=f"torch is built without GPU support on {_names(no_gpu)}, where Ray counts one",
            advice="install a CUDA (or ROCm) build of torch and torchvision there",
        )
    small = [f["host"] for f in nodes if _number(f["memory"], "free") < f["num_cpus"] * _GIB]
    least = min((_number(f["memory"], "free") for f in nodes), default=0)
    yield Finding(
        what="memory",
        status="warning" if small else "ok",
        text=f"less than 1 GiB free per CPU on {_names(small)}"
        if small
        else f"at least {least / _GIB:.1f} GiB free{_everywhere(nodes)}",
        advice="run fewer trials at once (tune.max_concurrent) or start that node with fewer "
        "--num-cpus"
        if small
        else "",
    )
    tight = [
        f["host"]
        for f in nodes
        if isinstance(f["shm_bytes"], int) and f["shm_bytes"] < f["object_store_bytes"]
    ]
    least = min((f["object_store_bytes"] for f in nodes), default=0)
    yield Finding(
        what="object store",
        status="warning" if tight else "ok",
        text=f"/dev/shm is smaller than it on {_names(tight)}, so Ray uses the disk"
        if tight
        else f"at least {least / _GIB:.2f} GiB{_everywhere(nodes)}",
        advice="make /dev/shm larger (docker: --shm-size), or --object-store-memory smaller"
        if tight
        else "",
    )
    few = [f["host"] for f in nodes if 0 <= f["num_files"] < 4096]
    yield Finding(
        what="open files",
        status="warning" if few else "ok",
        text=f"fewer than 4096 allowed on {_names(few)}" if few else "at least 4096 allowed",
        advice="ulimit -n 65536 before `ray start`" if few else "",
    )
    full = [f["host"] for f in nodes if _number(f["temp_free_share"]) < 0.05]
    if full:
        yield Finding(
            what="disk",
            status="warning",
            text=f"the temporary folder is more than 95 % full on {_names(full)}; Ray stops "
            "spilling objects there",
            advice="remove old /tmp/ray/session_* folders, or ray start --temp-dir elsewhere",
        )


def _tool_findings(nodes: Sequence[Facts]) -> Iterator[Finding]:
    lacking = [f["host"] for f in nodes if f["tensorboard"] is None]
    yield Finding(
        what="TensorBoard",
        status="warning" if lacking else "ok",
        text=f"missing on {_names(lacking)}" if lacking else "there",
        advice="pip install tensorboard" if lacking else "",
    )
    found = _by(nodes, lambda f: f["crystfel"] if isinstance(f["crystfel"], str) else "missing")
    for version, hosts in found.items():
        is_there = version != "missing"
        yield Finding(
            what="CrystFEL",
            status="ok",
            text=f"{version} on {_names(hosts)}" if is_there else f"not on {_names(hosts)}",
            advice=""
            if is_there
            else "nothing, unless `ssl2rl sfx` is to drive it there: training and the embedded "
            "pipeline need none",
        )


def _by(nodes: Sequence[Facts], of: Callable[[Facts], str]) -> dict[str, list[str]]:
    """Hosts by what they say."""
    found: dict[str, list[str]] = {}
    for facts in nodes:
        found.setdefault(of(facts), []).append(facts["host"])
    return found


def _names(hosts: Sequence[str]) -> str:
    """Hosts in words."""
    unique = list(dict.fromkeys(hosts))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")


def _everywhere(nodes: Sequence[Facts]) -> str:
    return f" on all {len(nodes)} nodes" if len(nodes) > 1 else ""


def _number(value: Any, key: str | None = None) -> float:
    """A number that a node told; infinity where it could not."""
    value = value.get(key) if key and isinstance(value, Mapping) else value
    return float(value) if isinstance(value, int | float) else float("inf")
