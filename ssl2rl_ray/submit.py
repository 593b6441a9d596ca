"""A run or a sweep as a job on a Ray cluster: what is sent, how it is followed, how it ended.

What a job needs travels in one zip archive, made afresh and kept: the code of ``ssl2rl_ray`` and
``envs`` as it is here, the config, and the datasets that the config names by relative paths. It is
the job's working directory on every node, so the cluster runs this code whatever is installed
there, and nothing is fetched when the job starts. That folder is temporary: results go to one that
every node sees.

The cluster asks for a token, as the deployment files set it. It is read where Ray reads it, and
sent only to a cluster that asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import file_digest
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ssl2rl_ray.config import RunConfig, load_config
from ssl2rl_ray.runs import git_revision
from ssl2rl_ray.schema import read_yaml, to_dict
from ssl2rl_ray.sweep import TuneConfig, load_sweep, need_of

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
LIMIT_BYTES = 512 * 2**20
"""Of a working directory, by Ray (its largest gRPC message)."""
PATHS = (
    "data.train",
    "data.validation",
    "data.calibration",
    "data.dataset",
    "classifier.initial",
    "training.pseudo_labels",
)
"""Fields of configs that name files or folders."""
_ENV = {"PYTHONUNBUFFERED": "1"}  # logs as they are written
_STORAGE = '"${SSL2RL_STORAGE:?is not set on the cluster, name an absolute --out}"'
_EPOCH = (1980, 1, 1, 0, 0, 0)  # in archives, so that equal contents are equal files
_PATIENCE_S = 60.0
"""How long a cluster may be out of reach while a job is followed."""
_SILENCE_S = 20.0
"""After which a job that says nothing is asked how it is."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, and the archive in which it runs."""

    entrypoint: tuple[str, ...]
    archive: Path
    """Zip file: the working directory of the job on every node."""
    sizes: Mapping[str, int]
    """Bytes in the archive, before compression, by part."""
    expected: tuple[str, ...] = ()
    """Absolute paths that the config names: they must be there on every node."""
    num_cpus: float = 0
    """Of the entrypoint's own process; 0: it runs on the head and trains nothing itself."""
    num_gpus: float = 0
    out: str = ""
    """Where its results go; relative: below the cluster's storage_path."""


Files = dict[str, Path | bytes]
"""What is in the archive, by path: a file's contents, or where they are."""


# ---- what is sent --------------------------------------------------------------------------------


def job_of(
    config: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    num_gpus: float = 0,
    python: str = "python",
    archive: str | os.PathLike[str] | None = None,
) -> Job:
    """The job that does ``ssl2rl run`` or, where the file has a ``base``, ``ssl2rl sweep``.

    Args:
        config: of a run or a sweep.
        out: folder for the run or the trials, which every node must see; where it is relative,
            below the cluster's storage_path (SSL2RL_STORAGE, which the deployment files set for
            all of its processes). None = NAME-TIME there.
        overrides: as for ``--set``.
        resume: go on with what is in ``out``, which must be named then.
        num_gpus: of a run; a sweep's file says what its trials get.
        python: how the cluster's nodes call their Python.
        archive: where the zip file is kept; None = ``runs/submitted/NAME-DIGEST.zip``.

    Raises:
        ValueError: nothing to resume, a mistake in the config, data that are not there or link to
            what does not go along, or more than Ray takes.
    """
    if resume and not out:
        raise ValueError(
            "--resume: name the --out to go on in; the line `results:` of the first submission has "
            "it, without --out NAME-TIME"
        )
    out = os.path.normpath(out or f"{Path(config).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    if out.split(os.sep)[0] in ("..", "."):
        raise ValueError(f"--out {out}: name an absolute folder, or one below the storage_path")
    name = Path(config).name
    values = read_yaml(os.fspath(config))
    is_sweep = "base" in values
    if is_sweep:
        sweep = load_sweep(config, overrides)
        runs = list(sweep.trials.values())
        values["base"] = dict(sweep.base)  # one file: its base, wherever that lies, is in it
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()
        if num_gpus:
            raise ValueError("--num-gpus is of a run; of a sweep's trials: --set tune.num_gpus=1")
    else:
        runs = [load_config(config, overrides)]
        text = Path(config).read_bytes()
    carried, expected = _data(runs)
    parts: dict[str, Files] = {f"configs/{name}": {f"configs/{name}": text}}
    parts |= {path: _files(source, path) for path, source in carried.items()}
    before = [python, "-m", "ssl2rl_ray", "sweep" if is_sweep else "run", f"configs/{name}"]
    before += ["--resume"] * resume
    before += [word for override in overrides for word in ("--set", override)]
    before += ["--out" if is_sweep else "--run-dir"]
    entrypoint = [*before, out]
    if not os.path.isabs(out):  # only the cluster knows where: its shell puts it in
        entrypoint = ["sh", "-c", f"exec {shlex.join(before)} {_STORAGE}/{shlex.quote(out)}"]
    return _job(
        entrypoint,
        parts,
        Path(config).stem,
        archive,
        expected=expected,
        num_cpus=0 if is_sweep else need_of(runs[0], TuneConfig()).num_cpus,
        num_gpus=num_gpus,
        out=out,
    )


def job_of_command(
    words: Sequence[str], *, python: str = "python", archive: str | os.PathLike[str]
) -> Job:
    """The job that does ``ssl2rl WORDS`` on the head, with our code and nothing else."""
    return _job([python, "-m", "ssl2rl_ray", *words], {}, words[0], archive)


def _job(
    entrypoint: Sequence[str],
    parts: Mapping[str, Files],
    name: str,
    archive: str | os.PathLike[str] | None,
    **rest: Any,
) -> Job:
    parts = {**_code(), **parts}
    sizes = {part: sum(map(_size, files.values())) for part, files in parts.items()}
    if (total := sum(sizes.values())) >= LIMIT_BYTES:
        largest = sorted(sizes, key=lambda part: -sizes[part])[:3]
        raise ValueError(
            f"{_mib(total)} to send, and Ray takes less than {_mib(LIMIT_BYTES)}; the largest: "
            + ", ".join(f"{part} ({_mib(sizes[part])})" for part in largest)
            + "; put them on storage that every node sees, and name them by absolute paths"
        )
    contents = {path: source for files in parts.values() for path, source in files.items()}
    packed = _pack(contents, name, archive)
    return Job(entrypoint=tuple(entrypoint), archive=packed, sizes=sizes, **rest)


def _code() -> dict[str, Files]:
    """Our two packages, as they are here."""
    import envs
    import ssl2rl_ray

    roots = [Path(package.__path__[0]) for package in (ssl2rl_ray, envs)]
    code = {root.name: _files(root, root.name) for root in roots}
    if revision := git_revision(roots[0].parent):  # so that manifests of the job's runs name it
        code["revision"] = {".git/HEAD": revision.encode()}
    return code


def _files(source: Path, name: str) -> Files:
    """A file, or every file of a folder, by its path in the archive."""
    if source.is_file():
        return {name: source}
    return {
        f"{name}/{path.relative_to(source).as_posix()}": path
        for path in _walk(source)
        if path.is_file() and path.suffix != ".pyc"
    }


def _walk(source: Path) -> Iterator[Path]:
    """Files and folders below a folder, through links; nothing hidden, such as ``.env``."""
    for folder, below, files in os.walk(source, followlinks=True):
        below[:] = sorted(name for name in below if name[0] != "." and name != "__pycache__")
        yield from (Path(folder, name) for name in (*below, *sorted(files)) if name[0] != ".")


def _check_links(field: str, source: Path) -> None:
    """Raises ValueError for a link out of the folder, to what is hidden there, or in a circle."""
    root = os.path.realpath(source)
    for path in _walk(source):
        if not path.is_symlink():
            continue
        target = Path(os.path.realpath(path))
        inside = target.relative_to(root).parts if target.is_relative_to(root) else (".",)
        is_circle = str(target) in map(os.path.realpath, path.parents)
        if is_circle or not target.exists() or any(part.startswith(".") for part in inside):
            raise ValueError(
                f"{field}: {path} is a link to {target}, which does not go along; put a copy in "
                "its place, or name the data by an absolute path that every node has"
            )


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _data(runs: Sequence[RunConfig]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What the configs name: what goes along, by its relative path, and what must be there."""
    carried: dict[str, Path] = {}
    expected: dict[str, None] = {}
    for field, path in dict.fromkeys(item for run in runs for item in _paths(run)):
        if os.path.isabs(path):
            expected[path] = None
            continue
        name = Path(os.path.normpath(path)).as_posix()
        if name.split("/")[0] in ("..", ".", "configs", "envs", "ssl2rl_ray"):
            raise ValueError(
                f"{field}: {path} cannot go along (it must lie below this folder, not in one named "
                "configs, envs or ssl2rl_ray); name it by an absolute path that every node has"
            )
        if not Path(path).exists():
            raise ValueError(
                f"{field}: there is no {path} here; a relative path is sent along with the job, an "
                "absolute one is looked for on the nodes"
            )
        _check_links(field, Path(path))
        carried[name] = Path(path)
    return carried, tuple(expected)


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    values = to_dict(config)
    for field in PATHS:
        found: Any = values
        for key in field.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        for path in [found] if isinstance(found, str) else found or ():
            yield field, path


def _pack(
    contents: Mapping[str, Path | bytes], name: str, archive: str | os.PathLike[str] | None
) -> Path:
    """Writes the zip file; equal contents are equal bytes, which Ray takes only once."""
    folder = Path("runs/submitted") if archive is None else Path(archive).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with (
            os.fdopen(descriptor, "w+b") as stream,
            zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as pack,
        ):
            for path in sorted(contents):
                source = contents[path]
                data = source if isinstance(source, bytes) else source.read_bytes()
                entry = zipfile.ZipInfo(path, _EPOCH)
                entry.external_attr = 0o644 << 16
                pack.writestr(entry, data, zipfile.ZIP_DEFLATED)
        with open(partial, "rb") as stream:
            digest = file_digest(stream, "sha256").hexdigest()[:12]
        target = folder / f"{name}-{digest}.zip" if archive is None else Path(archive)
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target.absolute()


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def describe(job: Job) -> str:
    """What is sent, in lines."""
    parts = ", ".join(f"{part} {_mib(size)}" for part, size in job.sizes.items())
    lines = [f"sends {_mib(job.archive.stat().st_size)} ({job.archive}): {parts}"]
    lines += [f"every node must have {path}" for path in job.expected]
    if job.out:
        is_below = not os.path.isabs(job.out)
        where = f"{job.out}, below the cluster's storage_path" if is_below else job.out
        lines.append(f"results: {where}")
    return "\n".join(lines)


def command_line(job: Job, address: str) -> str:
    """The ``ray job submit`` that does the same, to be pasted into a shell."""
    words = ["ray", "job", "submit", "--address", address, "--working-dir", str(job.archive)]
    words += ["--runtime-env-json", json.dumps({"env_vars": _ENV})]
    for option, value in (("cpus", job.num_cpus), ("gpus", job.num_gpus)):
        words += [f"--entrypoint-num-{option}", f"{value:g}"] if value else []
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    return f"RAY_AUTH_MODE={shlex.quote(mode)} " + shlex.join([*words, "--", *job.entrypoint])


# ---- the cluster ---------------------------------------------------------------------------------


def connect(address: str) -> Any:
    """Ray's ``JobSubmissionClient`` of a cluster that asks for a token, with the token.

    ``RAY_AUTH_MODE=disabled`` in the environment: of a cluster that asks for none.

    Raises:
        ValueError: not an address of a dashboard, nobody there, no token, or not the right one; a
            cluster that is open to everybody, or does not say so, unless that was asked for.
    """
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise ValueError(
            f"--address {address!r}: expected the dashboard's address, such as {DEFAULT_ADDRESS}"
        )
    is_near = is_loopback(address)
    if is_near:  # a proxy is for what is far: it would be told the token
        host = urlsplit(address).hostname or ""
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))
    try:
        mode = authentication_mode(address)
    except OSError as error:
        raise ValueError(
            f"nobody answers at {address} ({error}): is the cluster up, and its port 8265 "
            "forwarded to here (ssh -L 8265:127.0.0.1:8265 HEAD)?"
        ) from error
    headers = {}
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "disabled":
        if mode != "token":  # whoever it is, it gets none
            what = (
                f"the cluster at {address} runs what anybody sends it"
                if mode == "disabled"
                else f"{address} does not ask for a token; this does not say that it is a Ray "
                "dashboard. If it is one"
            )
            raise ValueError(
                f"{what}: start all of it with RAY_AUTH_MODE=token, as our deployment files do; to "
                "submit all the same, set RAY_AUTH_MODE=disabled here"
            )
        headers["Authorization"] = f"Bearer {read_token()}"
        if not is_near and urlsplit(address).scheme == "http":
            print(
                f"warning: the token travels to {address} in the clear; forward the port by ssh "
                "(ssh -L 8265:127.0.0.1:8265 HEAD) and use 127.0.0.1",
                file=sys.stderr,
            )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address, headers=headers)
    except AuthenticationError as error:
        if not headers:
            raise ValueError(
                f"{address} asks for a token and was sent none, as RAY_AUTH_MODE=disabled is set "
                "here: unset it (unset RAY_AUTH_MODE)"
            ) from error
        raise ValueError(
            f"{address} does not take this token ({str(error).splitlines()[0]}): it must be the "
            "one that the cluster was started with (there: ray get-auth-token), in RAY_AUTH_TOKEN, "
            "in the file of RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token"
        ) from error


def is_loopback(address: str) -> bool:
    """Whether a URL names this machine by its loopback."""
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def authentication_mode(address: str) -> str | None:
    """What a dashboard says it asks for: ``token`` or ``disabled``; None = it does not say."""
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(address) else []
    url = address.rstrip("/") + "/api/authentication_mode"
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=10) as reply:
            return json.load(reply).get("authentication_mode")
    except (urllib.error.HTTPError, HTTPException, ValueError, AttributeError):
        return None


def token_file() -> Path:
    """Where Ray looks for the token, where no variable has it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def read_token() -> str:
    """The token, from where Ray itself takes it; raises ValueError where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = token_file()
    with contextlib.suppress(OSError):
        if token := file.read_text().strip():
            return token
    raise ValueError(
        f"no token: RAY_AUTH_TOKEN is not set and {file} is missing or empty; take the cluster's "
        "(on its head: ray get-auth-token), put it there and keep it to yourself (chmod 600)"
    )


def submit(job: Job, client: Any) -> str:
    """Sends the job; returns its submission id."""
    return client.submit_job(
        entrypoint=shlex.join(job.entrypoint),
        runtime_env={"working_dir": str(job.archive), "env_vars": dict(_ENV)},
        entrypoint_num_cpus=job.num_cpus or None,
        entrypoint_num_gpus=job.num_gpus or None,
    )


def follow(client: Any, job_id: str, write: Callable[[str], Any]) -> dict[str, Any]:
    """Writes the job's logs as they come, until it ends; a lost connection is made again.

    Returns:
        ``status`` (``SUCCEEDED``, ``FAILED``, ``STOPPED``), ``exit_code`` (the job's own, as a
        shell would say it; 1 where it has none) and ``message``.

    Raises:
        OSError: the cluster has not answered for a minute. The job goes on if the cluster does.
    """
    from aiohttp import ClientError  # neither OSError nor RuntimeError, most of them

    num_written = 0

    async def tail() -> None:
        nonlocal num_written
        num_seen = 0  # the logs come from their beginning each time
        async for text in _spoken(client, job_id, write):
            num_seen += len(text)
            if new := text[max(0, len(text) - max(0, num_seen - num_written)) :]:
                write(new)
                num_written += len(new)

    def is_told_to_its_end() -> bool:
        try:
            asyncio.run(tail())
        except (OSError, RuntimeError, ClientError):
            return False
        return True

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        is_whole = is_told_to_its_end()
        try:
            info = client.get_job_info(job_id)
            deadline = time.monotonic() + _PATIENCE_S
        except (OSError, RuntimeError) as error:  # the latter: an answer of 500 and the like
            if time.monotonic() > deadline:
                raise OSError(str(error)) from error
        else:
            if info.status.is_terminal():
                if not is_whole:  # the line broke, and the job ended before it was made again
                    is_told_to_its_end()
                break
        time.sleep(0.5)
    status, code = info.status.value, info.driver_exit_code
    if code is None:
        code = 0 if status == "SUCCEEDED" else 1
        text = f"{status}: {info.message}"
    else:
        code = code if code >= 0 else 128 - code
        text = f"{status}, exit code {code}"  # Ray's message says the logs again
    return {"status": status, "exit_code": code, "message": text}


async def _spoken(client: Any, job_id: str, write: Callable[[str], Any]) -> AsyncIterator[str]:
    """The job's log stream; where it is silent for long, the job is asked how it is.

    A job that waits for a place says nothing, and a line that is cut does not either: the first is
    told, the second ends the stream once the job is over, or with OSError.
    """
    stream = client.tail_job_logs(job_id)
    is_told = is_over = False
    coming = asyncio.ensure_future(anext(stream))
    while True:
        done, _ = await asyncio.wait({coming}, timeout=_SILENCE_S)
        if done:
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(anext(stream))
            continue
        if is_over:
            return
        info = await asyncio.to_thread(client.get_job_info, job_id)
        is_over = info.status.is_terminal()
        if info.status.value == "PENDING" and not is_told:
            is_told = True
            write(f"still waiting for a place: {info.message}\n")


def how_to_go_on(job_id: str, address: str) -> str:
    """How to see and to stop a job that nobody follows."""
    prefix = f"RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', 'token')} ray job"
    return "\n".join(
        f"  {prefix} {what} --address {address} {job_id}" for what in ("logs --follow", "stop")
    )
