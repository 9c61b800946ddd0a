"""The `serve` command: runs the gateway."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_backends.cli.completion import complete_backend
from training_backends.cli.session import JsonOption, run_async

if TYPE_CHECKING:
    from training_backends.gateway.gateway import Gateway
    from training_backends.gateway.settings import GatewaySettings

__all__ = ["serve"]

_DESCRIPTORS = 65_536
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
_KUBERNETES = "KUBERNETES_SERVICE_HOST"


def serve(
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="ADDRESS", help="Address to bind; default: 127.0.0.1."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            min=0,
            max=65535,
            help="Port; default: 8321; 0: any free port.",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="Backend that runs the jobs.",
            autocompletion=complete_backend,
        ),
    ] = "local",
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="FILE", help="TLS certificate chain; enables HTTPS."),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", metavar="FILE", help="Private key, if not in --tls-cert."),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-client-ca",
            metavar="FILE",
            help="Require client certificates signed by this CA (mTLS).",
        ),
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Allow plain HTTP on a non-loopback address.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Serve the Mistral fine-tuning API for a backend."""
    from training_backends.core.settings import load_settings

    _need_extra()
    from training_backends.gateway.settings import GatewaySettings

    settings = load_settings(GatewaySettings)
    options = {
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "plain_http": plain_http,
    }
    given = {name: value for name, value in options.items() if value}
    settings = settings.model_copy(update=given)
    _raise_descriptor_limit()
    run_async(lambda: _serve(settings, host, port, backend, json=json))


def _raise_descriptor_limit() -> None:
    """Raise the file descriptor limit towards the hard limit; shells often default to 1,024."""
    import resource
    from contextlib import suppress

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(
    settings: "GatewaySettings", host: str | None, port: int | None, backend: str, *, json: bool
) -> None:
    import signal
    from contextlib import suppress

    import anyio

    from training_backends.cli.views.console import write_json_line
    from training_backends.core.settings import Settings, load_settings
    from training_backends.gateway.server import running

    home = load_settings(Settings).home.expanduser().absolute()

    def say(text: str) -> None:
        # A full disk or a closed pipe must not stop the gateway.
        with suppress(OSError):
            typer.echo(text, err=True)

    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with running(settings, home=home, backend=backend, host=host, port=port) as served:
            new_key = await _first_key(served.gateway)
            if json:
                document = {"url": served.url, "backend": backend, "home": str(home)}
                write_json_line({**document, "key": new_key} if new_key else document)
            say(f"Serving the Mistral API at {served.url}")
            say(f"  backend {backend}, state in {served.gateway.home}")
            if settings.console:
                say(f"  console at {served.url}/")
            if new_key and not json:
                say("  first API key, shown only once:")
                typer.echo(new_key)
            say("  Press Ctrl-C to stop; training in progress keeps running.")
            async for number in signals:
                if number == signal.SIGTERM and _ends_with_container():
                    say("Saving the progress of the training in this container …")
                    found = await served.gateway.client.backend(backend).suspend()
                    say(f"Runs saved: {found}. They continue when the gateway starts again.")
                break
    say("Gateway stopped.")


def _ends_with_container() -> bool:
    """Return whether this is the main process of a container, whose end ends all others."""
    import os

    marked = any(map(Path.exists, map(Path, _CONTAINER_MARKS))) or _KUBERNETES in os.environ
    return os.getpid() == 1 or (os.getppid() == 1 and marked)  # or under an init process


async def _first_key(gateway: "Gateway") -> str | None:
    """Create the first key if standard output is a terminal; elsewhere a log could record it."""
    from anyio import to_thread

    from training_backends import ConfigError

    if await to_thread.run_sync(gateway.keys.usable):
        return None
    if not sys.stdout.isatty():
        raise ConfigError(
            "The gateway has no API key.",
            hint="Run `training-backends keys create`, or set TRAINING_BACKENDS_GATEWAY__API_KEY.",
        )
    made = await to_thread.run_sync(gateway.keys.create, "first")
    return made.key.get_secret_value()


def _need_extra() -> None:
    from importlib.util import find_spec

    from training_backends import BackendNotInstalled

    if not all(
        map(find_spec, ("fastapi", "httptools", "multipart", "prometheus_client", "uvicorn"))
    ):
        raise BackendNotInstalled(
            "The gateway's dependencies are not installed.",
            install="pip install 'training-backends[gateway]'",
        )
