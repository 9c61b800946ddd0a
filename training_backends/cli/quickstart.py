"""The `quickstart` command: trains a small model through client, gateway and local trainer."""

import re
import shlex
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from training_backends.cli.session import JsonOption, command, exit_with, run_async, short_path

if TYPE_CHECKING:
    from rich.console import Console

    from training_backends import AsyncTrainingClient, TrainingConfig, TrainingRun
    from training_backends.backends.local.interpreter import Interpreter
    from training_backends.cli.exit_codes import Interrupted

__all__ = ["quickstart"]

_HEAD = """\
# The quickstart's run. Replace the data with your own and launch it:
#   training-backends launch {name} --follow

backend: local
"""
_TINY_CONFIG = """\
model: tiny-mistral          # demo model: about 1 M random parameters, full fine-tuning
data:
  train: data/train.jsonl
  validation: data/validation.jsonl
hyperparameters:
  training_steps: 300
  learning_rate: 0.002
  seq_len: 256               # maximum tokens per row; tiny-mistral uses one token per byte
"""
_CONFIG = """\
model: {model}
tuning: lora
data:
  train: data/train.jsonl
  validation: data/validation.jsonl
hyperparameters:
  training_steps: 24
  learning_rate: 0.0005
  seq_len: 256
"""


class _Lesson(NamedTuple):
    """What a model is taught.

    Attributes:
        samples: Prefix of the sample files.
        before: What to expect of the answer before training.
        after: What the question has to do with the training data.
    """

    samples: str
    question: str
    before: str
    after: str


_TINY = _Lesson(
    "",
    "What does the status ready mean?",
    "random weights, so expect noise",
    # A model this small memorizes and does not generalize.
    "a question from the training data",
)
_PRETRAINED = _Lesson(
    "facts-",
    "What is the capital of France?",
    "the base model",
    "a question that is not in the training data; the answers in it are JSON",
)


def quickstart(
    directory: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Directory for all files.")
    ] = Path("quickstart"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME|DIR",
            help="Pretrained chat model, as ORGANIZATION/NAME or a directory; default: "
            "tiny-mistral, which needs no network.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train a small model on this machine; no API key needed."""
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.core.run import new_run_id

    _need_extras()
    home = directory.expanduser().absolute()
    run_id = new_run_id()
    out = stderr()
    out.quiet = json
    show = _Quickstart(home, run_id, out, model)
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
    question: str
    before: str
    after: str

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "run": self.run.model_dump(mode="json"),
            "model": str(self.model) if self.model else None,
            "question": self.question,
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
                _at_gateway(self.home, "generate", str(self.run.remote_id), self.question),
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

    def __init__(self, home: Path, run_id: str, out: "Console", model: str | None) -> None:
        self._home = home
        self._model = model
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
        from training_backends.core.config import TINY_MODEL
        from training_backends.gateway.server import running
        from training_backends.gateway.settings import GatewaySettings

        state = self._home / "state"
        config = load_config(_prepare(self._home, self._model)).config
        model = config.base_model
        lesson = _TINY if model == TINY_MODEL else _PRETRAINED
        catalogue = None if model == TINY_MODEL else _offer(self._home, model)
        if catalogue is not None:
            # The gateway offers the model under a name; the tuning is that of its catalogue.
            config = config.model_copy(update={"model": _name_of(model), "tuning": None})
        async with AsyncExitStack() as stack:
            self._title("Gateway", "serves the Mistral API for the local backend")
            # On loopback, regardless of the user's gateway settings.
            settings = GatewaySettings(
                port=0,
                host="127.0.0.1",
                public_url=None,
                catalogue=catalogue,
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
            before = await _answer(model, lesson.question, state)
            self._show_answer(before, "before training", f"{lesson.question} ({lesson.before})")
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
                return _Result(self._home, run, None, lesson.question, before, "")
            reply = await gateway.gateway.client.sample(str(run.remote_id), lesson.question)
            after = str(reply.answer)
            self._show_answer(after, "after training", f"{lesson.question} ({lesson.after})")
            target = self._home / "models" / run.id
            saved = await gateway.gateway.client.download(str(run.remote_id), target)
            self._title("Model", str(short_path(saved)))
            return _Result(self._home, run, saved, lesson.question, before, after)

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

    def _show_answer(self, answer: str, when: str, what: str) -> None:
        self._title(f"Answer {when}", what)
        self._out.print(f"  {answer!r}", markup=False)

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


async def _answer(model: str, question: str, state: Path) -> str:
    """Return what a model answers before training."""
    from training_backends import CredentialVault
    from training_backends.backends.local.process import Hub, ask_model
    from training_backends.backends.local.settings import LocalSettings
    from training_backends.core.settings import load_settings

    interpreter = _interpreter()
    hub = Hub(load_settings(LocalSettings), CredentialVault(home=state), interpreter)
    child_env = await hub.child_environment(model)
    reply = await ask_model(model, question, child_env=child_env, interpreter=interpreter)
    return str(reply.answer)


def _interpreter() -> "Interpreter":
    from training_backends.backends.local.interpreter import Interpreter
    from training_backends.backends.local.settings import LocalSettings
    from training_backends.core.settings import load_settings

    return Interpreter(load_settings(LocalSettings).python)


def _name_of(model: str) -> str:
    """Return the name under which the gateway offers a model."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._") or "model"


def _offer(home: Path, model: str) -> Path:
    """Write the gateway's catalogue with one more model."""
    from json import dumps

    path = home / "models.toml"
    target = dumps(model, ensure_ascii=False)  # also a TOML string
    path.write_text(f'[models."{_name_of(model)}"]\ntarget = {target}\n', encoding="utf-8")
    return path


def _prepare(home: Path, model: str | None) -> Path:
    """Write the sample data and configuration, unless the directory already has them."""
    from importlib.resources import files
    from json import dumps

    from training_backends import ConfigError
    from training_backends.backends.local.spec import resolved_model
    from training_backends.client.config_file import load_config
    from training_backends.core.config import TINY_MODEL

    config = home / "run.yaml"
    model = resolved_model(model) if model else None
    if config.exists():
        if model not in {None, existing := load_config(config).config.base_model}:
            raise ConfigError(
                f"{home} is the quickstart of another model, {existing!r}.",
                hint="Choose another directory with --dir.",
            )
        return config
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ConfigError(
            f"{home} already exists and is not a quickstart directory.",
            hint="Choose another directory with --dir.",
        )
    data = home / "data"
    data.mkdir(parents=True, exist_ok=True)
    is_tiny = model in {None, TINY_MODEL}
    lesson = _TINY if is_tiny else _PRETRAINED
    for name in ("train.jsonl", "validation.jsonl"):
        sample = files("training_backends") / "samples" / f"{lesson.samples}{name}"
        (data / name).write_bytes(sample.read_bytes())
    body = _TINY_CONFIG if is_tiny else _CONFIG.format(model=dumps(model, ensure_ascii=False))
    # Written last, so that a directory with this file is complete.
    config.write_text(_HEAD.format(name=config.name) + body, encoding="utf-8")
    return config


def _need_extras() -> None:
    from importlib.util import find_spec

    from training_backends import BackendNotInstalled

    interpreter = _interpreter()
    missing = []
    if not all(map(find_spec, ("fastapi", "multipart", "uvicorn"))):
        missing.append("gateway")
    if interpreter.is_this and interpreter.missing():
        missing.append("local")
    if missing:
        extras = ",".join(missing)
        raise BackendNotInstalled(
            f"The quickstart requires the extras {extras}.",
            install=f"pip install 'training-backends[{extras}]'",
        )
    interpreter.require()
