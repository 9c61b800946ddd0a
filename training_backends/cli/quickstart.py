"""The `quickstart` command: trains a tiny model through client, gateway and local trainer."""

import shlex
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training_backends.cli.session import JsonOption, command, exit_with, run_async, short_path

if TYPE_CHECKING:
    from rich.console import Console

    from training_backends import AsyncTrainingClient, TrainingConfig, TrainingRun
    from training_backends.cli.exit_codes import Interrupted

__all__ = ["quickstart"]

QUESTION = "What does the status ready mean?"
"""Taken from the training data, because a model this small memorizes and does not generalize."""
_CONFIG = """\
# The quickstart's run. Replace the data with your own and launch it:
#   training-backends launch {name} --follow

backend: local
model: tiny-mistral          # demo model: about 1 M random parameters, full fine-tuning
data:
  train: data/train.jsonl
  validation: data/validation.jsonl
hyperparameters:
  training_steps: 300
  learning_rate: 0.002
  seq_len: 256               # maximum tokens per row; tiny-mistral uses one token per byte
"""


def quickstart(
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Directory for all files.")
    ] = Path("quickstart"),
    json: JsonOption = False,
) -> None:
    """Train a tiny model on this machine; no API key needed."""
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.core.run import new_run_id

    _need_extras()
    home = directory.expanduser().absolute()
    run_id = new_run_id()
    out = stderr()
    out.quiet = json
    show = _Quickstart(home, run_id, out)
    found = run_async(show.run, interrupted=show.interrupted)
    if json:
        write_json(found.document())
    else:
        found.show_next_steps(out)
    exit_with(found.run)


@dataclass(frozen=True, slots=True)
class _Result:
    """Outcome of the quickstart."""

    home: Path
    run: "TrainingRun"
    model: Path | None
    before: str
    after: str

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "run": self.run.model_dump(mode="json"),
            "model": str(self.model) if self.model else None,
            "question": QUESTION,
            "answer_before": self.before,
            "answer_after": self.after,
        }

    def show_next_steps(self, out: "Console") -> None:
        """Print the commands to run next."""
        if self.model is None:
            return
        from rich.markup import escape

        config = str(short_path(self.home / "run.yaml"))
        data = short_path(self.home / "data") / "train.jsonl"
        sections = {
            "[bold]Inspect this run[/]": [
                command("list"),
                command("metrics", self.run.id),
                _at_gateway(self.home, "generate", str(self.run.remote_id), QUESTION),
            ],
            f"[bold]Train on your own data[/], in {escape(str(data))}": [
                command("validate", config),
                command("launch", config, "--follow"),
            ],
            "[bold]Serve existing Mistral clients[/], such as the official SDKs": [
                command("keys", "create"),
                command("serve", "--backend", "local"),
            ],
        }
        for title, lines in sections.items():
            out.print()
            out.print(title)
            for line in lines:
                out.print(f"  {line}", markup=False)


class _Quickstart:
    """Runs the steps of the quickstart and prints each of them."""

    def __init__(self, home: Path, run_id: str, out: "Console") -> None:
        self._home = home
        self._run_id = run_id
        self._out = out
        self._job_id: str | None = None

    def interrupted(self) -> "Interrupted":
        """Return the error for Ctrl-C."""
        from training_backends.cli.exit_codes import Interrupted

        if self._job_id is None:
            text = "Interrupted before the run was started."
            return Interrupted(text, hint=f"Start over: {command('quickstart')}")
        follow = _at_gateway(self._home, "logs", self._job_id, "--follow")
        stop = _at_gateway(self._home, "stop", self._job_id)
        text = f"Interrupted; job {self._job_id} keeps running."
        return Interrupted(text, hint=f"Follow: {follow}\nStop: {stop}", run_id=self._job_id)

    async def run(self) -> _Result:
        """Run all steps and return once the run has finished."""
        from training_backends import AsyncTrainingClient, CredentialVault
        from training_backends.backends.mistral.backend import MistralAPIBackend
        from training_backends.backends.mistral.settings import MistralSettings
        from training_backends.cli.views.launch import LaunchView, follow_run
        from training_backends.client.config_file import load_config
        from training_backends.gateway.server import running
        from training_backends.gateway.settings import GatewaySettings

        state = self._home / "state"
        config = load_config(_prepare(self._home)).config
        async with AsyncExitStack() as stack:
            self._title("Gateway", "serves the Mistral API for the local backend")
            # On loopback, regardless of the user's gateway settings.
            settings = GatewaySettings(
                port=0,
                host="127.0.0.1",
                public_url=None,
                store_url=None,
                tls_cert=None,
                tls_key=None,
                tls_client_ca=None,
            )
            gateway = await stack.enter_async_context(
                running(settings, home=state, backend="local")
            )
            key = gateway.gateway.keys.create("quickstart").key
            self._out.print(f"  {gateway.url}", markup=False)
            backend = MistralAPIBackend(
                settings=MistralSettings(base_url=gateway.url),
                credentials=CredentialVault(home=state, explicit={"mistral": key}),
            )
            client = await stack.enter_async_context(
                # In the user's home, where `list` and `metrics` find the run.
                AsyncTrainingClient(backends={"mistral": backend})
            )
            stack.push_async_callback(_forget_unfinished, client, self._run_id)
            await self._preview(client, config)
            before = await self._ask(
                "tiny-mistral", "before training", "random weights, so expect noise"
            )
            self._title("Launch", "upload the data, create the job, get a quote, start")
            with LaunchView(quiet=self._out.quiet, out=self._out) as view:
                run = await client.launch(
                    config,
                    backend="mistral",
                    run_id=self._run_id,
                    on_progress=view.progress,
                    on_update=view.update,
                )
            self._job_id = run.remote_id
            self._title("Training", f"run {run.id}, job {run.remote_id}")
            run = await follow_run(
                client,
                run.id,
                quiet=self._out.quiet,
                shown_statuses=view.shown,
                out=self._out,
            )
            if run.status != "completed":
                return _Result(self._home, run, None, before, "")
            target = self._home / "models" / run.id
            model = await gateway.gateway.client.download(str(run.remote_id), target)
            after = await self._ask(
                str(model), "after training", "a question from the training data"
            )
            self._title("Model", str(short_path(model)))
            return _Result(self._home, run, model, before, after)

    async def _preview(self, client: Any, config: "TrainingConfig") -> None:
        """Print the contents of the data and the estimate."""
        from training_backends.cli.views.render import show_dataset, show_estimate, show_issues
        from training_backends.datasets.inspect import raise_for_errors

        self._title("Data", str(short_path(self._home / "data")))
        dataset = await client.inspect(config)
        show_dataset(dataset, self._out)
        raise_for_errors(dataset)
        show_issues(dataset.issues, self._out)
        self._title("Estimate", "from the tokens of this data")
        show_estimate(await client.estimate(config, backend="mistral"), self._out)

    async def _ask(self, model: str, when: str, note: str) -> str:
        from training_backends.backends.local.process import sample_answer

        answer = await sample_answer(model, QUESTION)
        self._title(f"Answer {when}", f"{QUESTION} ({note})")
        self._out.print(f"  {answer!r}", markup=False)
        return answer

    def _title(self, title: str, what: str) -> None:
        from rich.markup import escape

        self._out.print()
        self._out.print(f"[bold]{title}[/]  [dim]{escape(what)}[/]")


def _at_gateway(home: Path, *arguments: str) -> str:
    """Return a command line for the run that the gateway trains, in its own home."""
    gateway = short_path(home / "state" / "gateway")
    return f"TRAINING_BACKENDS_HOME={shlex.quote(str(gateway))} {command(*arguments)}"


async def _forget_unfinished(client: "AsyncTrainingClient", run_id: str) -> None:
    """Delete the record of an unfinished run, which cannot be observed without this gateway."""
    import anyio

    from training_backends import RunNotFound

    with anyio.CancelScope(shield=True), suppress(RunNotFound):
        if not (await client.get(run_id)).status.is_terminal:
            await client.delete(run_id, record_only=True)


def _prepare(home: Path) -> Path:
    """Write the sample data and configuration, unless the directory already has them."""
    from importlib.resources import files

    from training_backends import ConfigError

    config = home / "run.yaml"
    if config.exists():
        return config
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ConfigError(
            f"{home} already exists and is not a quickstart directory.",
            hint="Choose another directory with --dir.",
        )
    data = home / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "validation.jsonl"):
        sample = files("training_backends") / "samples" / name
        (data / name).write_bytes(sample.read_bytes())
    # Written last, so that a directory with this file is complete.
    config.write_text(_CONFIG.format(name=config.name), encoding="utf-8")
    return config


def _need_extras() -> None:
    from importlib.util import find_spec

    from training_backends import BackendNotInstalled

    needed = {"gateway": ("fastapi", "multipart", "uvicorn"), "local": ("torch", "transformers")}
    missing = [name for name, parts in needed.items() if not all(map(find_spec, parts))]
    if missing:
        extras = ",".join(missing)
        raise BackendNotInstalled(
            f"The quickstart requires the extras {extras}.",
            install=f"pip install 'training-backends[{extras}]'",
        )
