"""Servers in Docker, for machines that have an engine and nothing else."""

import shutil
import subprocess

from tests.brokers.errors import ServerFailedError
from tests.brokers.kind import Kind

__all__ = ["docker_answers", "run_container", "stop_container"]

# Seconds for a command of an engine that works; pulling an image takes longer.
_SECONDS = 20
_PULL_SECONDS = 600


def docker_answers() -> bool:
    """Whether there is a docker command with an engine behind it."""
    if shutil.which("docker") is None:
        return False
    try:
        return _docker("version", "--format", "{{.Server.Version}}").returncode == 0
    except subprocess.TimeoutExpired:
        return False


def run_container(kind: Kind, port: int) -> str:
    """Start the server in a container that Docker removes when it ends; return its id."""
    image = kind.image
    environment = {name: value.format(port=port) for name, value in image.environment.items()}
    done = _docker(
        *("run", "--detach", "--rm", "--label", "molva-brokers"),
        *("--publish", f"127.0.0.1:{port}:{image.port}"),
        *(f"--env={name}={value}" for name, value in environment.items()),
        image.name,
        *image.arguments,
        seconds=_PULL_SECONDS,
    )
    if done.returncode != 0:
        raise ServerFailedError(kind.name, f"docker run failed: {done.stderr.strip()}")
    return done.stdout.strip()


def is_running(container: str) -> bool:
    """Whether the container runs."""
    done = _docker("inspect", "--format", "{{.State.Running}}", container)
    return done.returncode == 0 and done.stdout.strip() == "true"


def stop_container(container: str) -> None:
    """Stop the container; Docker removes it, and its data with it."""
    _docker("stop", container, seconds=60)


def container_log(container: str) -> str:
    """Return the end of what it has said."""
    done = _docker("logs", "--tail", "30", container)
    return done.stdout + done.stderr


def _docker(*arguments: str, seconds: float = _SECONDS) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=seconds, check=False
    )
