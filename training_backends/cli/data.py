"""The `data` command group: inspect, preview, convert, repair, split and shard data files."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from training_backends.cli.completion import complete_format
from training_backends.cli.session import JsonOption, run_async

if TYPE_CHECKING:
    from training_backends.client.config_file import ConfigFile
    from training_backends.core.config import DataSource, TrainingConfig
    from training_backends.core.data_rules import ProviderFormat
    from training_backends.core.dataset import Dataset
    from training_backends.core.errors import Issue
    from training_backends.datasets.inspect import Progress
    from training_backends.datasets.shard import ShardFile
    from training_backends.datasets.split import SplitFile
    from training_backends.tokens import TokenCount

__all__ = [
    "convert",
    "data",
    "inspect",
    "preview",
    "provider_format_named",
    "read_size",
    "repair",
    "shard",
    "split",
]


def inspect(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Files, glob patterns, directories, URLs, or - for stdin.",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option("--validation", metavar="FILE", help="Validation file; repeatable."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            help="Run configuration (YAML) to take files, targets and method from.",
        ),
    ] = None,
    provider_format: Annotated[
        str | None,
        typer.Option(
            "--provider-format",
            metavar="FORMAT",
            help="Provider format: mistral, openai, together or local. Default: the backend of "
            "--config, or mistral.",
            show_default=False,
            autocompletion=complete_format,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="Count tokens with the tokenizer of this model."
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample-rows",
            min=2,
            metavar="ROWS",
            help="Estimate tokens from ROWS rows, with a 95% confidence interval.",
        ),
    ] = None,
    max_issues: Annotated[
        int,
        typer.Option("--max-issues", min=0, metavar="N", help="Maximum number of issues to show."),
    ] = 50,
    json: JsonOption = False,
) -> None:
    """Summarize data files and list every issue with its line number.

    Nothing is uploaded. Exits with 3 if there are errors.
    """
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.data import InspectView

    request = _request(files or [], validation or [], config, provider_format)
    with InspectView(request.provider_format, max_issues=max_issues, quiet=json) as view:
        found = request.inspect(
            on_issue=lambda issue: view.issue(request.locate(issue)), on_progress=view.reading
        )
        dataset = found.model_copy(update={"issues": tuple(map(request.locate, found.issues))})
        tokens = _count(dataset, model, sample, view.counting) if model else None
    if json:
        write_json(view.document(dataset, tokens))
    else:
        view.show(dataset, tokens)
    if dataset.errors:
        raise typer.Exit(ExitCode.INVALID)


class _Request(NamedTuple):
    """What the arguments of `data inspect` select.

    Attributes:
        inspect: Reads and checks the files.
        provider_format: The provider format.
        locate: Adds to an issue the position of its field in the configuration file.
    """

    inspect: "Callable[..., Dataset]"
    provider_format: "ProviderFormat"
    locate: "Callable[[Issue], Issue]"


def _request(
    files: list[str], validation: list[str], config: Path | None, provider_format: str | None
) -> _Request:
    from training_backends.cli.exit_codes import UsageError
    from training_backends.core.config import Data, TrainingConfig
    from training_backends.datasets.inspect import inspect as inspect_config
    from training_backends.datasets.inspect import inspect_files
    from training_backends.datasets.provider_formats import MISTRAL, PROVIDER_FORMATS

    if bool(files or validation) == bool(config):
        raise UsageError("Pass either files or --config.")
    chosen = provider_format_named(provider_format) if provider_format is not None else None
    if config:
        from training_backends.client.config_file import load_config

        file = load_config(config)
        rules = chosen or PROVIDER_FORMATS.get(file.backend or "", MISTRAL)
        local, named = _fetched(file.config)
        read = partial(inspect_config, local, provider_format=rules)
        return _Request(read, rules, lambda issue: file.located([named(issue)])[0])
    rules = chosen or MISTRAL
    data = Data(train=_sources(files), validation=_sources(validation))
    local, named = _fetched(TrainingConfig(data=data))
    read = partial(inspect_files, local.data.train, local.data.validation, provider_format=rules)
    return _Request(read, rules, named)


def _sources(names: Sequence[str]) -> "tuple[DataSource, ...]":
    from training_backends.core.config import DataSource
    from training_backends.datasets.open_file import expand

    found: list[DataSource] = []
    for name in names:
        if "://" in name:
            found.append(DataSource(uri=name))
        else:
            found += [DataSource(path=path) for path in expand([name])]
    return tuple(dict.fromkeys(found))


def _fetched(config: "TrainingConfig") -> "tuple[TrainingConfig, Callable[[Issue], Issue]]":
    """Fetch the remote data of a configuration.

    Returns:
        The configuration with local paths, and what names the URL in an issue.
    """
    if all(each.uri is None for each in (*config.data.train, *config.data.validation)):
        return config, lambda issue: issue
    from training_backends.client.remote_data import RemoteData, located
    from training_backends.core.settings import Settings, load_settings
    from training_backends.objects.cache import ObjectCache, objects_directory
    from training_backends.objects.settings import ObjectSettings

    home = load_settings(Settings).home.expanduser().absolute()
    remote = RemoteData(ObjectCache(objects_directory(home)), load_settings(ObjectSettings))
    recorded = run_async(lambda: remote.recorded(config))
    local = remote.local(recorded)
    return local, lambda issue: located([issue], recorded, local)[0]


def _count(
    dataset: "Dataset", model: str, sample: int | None, on_progress: "Progress"
) -> "TokenCount":
    from training_backends.core.dataset import Counting
    from training_backends.datasets.open_file import STDIN
    from training_backends.tokens import TokenCount, count_tokens

    if any(file.path == STDIN for file in dataset.train):
        return TokenCount(reason="standard input cannot be read twice")
    counting = Counting(sample=sample, on_progress=on_progress)
    return count_tokens(dataset.model_copy(update={"counting": counting}), model)


def preview(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Run configuration (YAML).", show_default=False)
    ],
    rows: Annotated[
        int, typer.Option("--rows", min=1, metavar="N", help="Rows to show of each training file.")
    ] = 3,
    json: JsonOption = False,
) -> None:
    """Show the text and tokens that rows become in training.

    What is in the loss is coloured, or between ⟦ and ⟧ without a terminal. Nothing is trained, and
    no GPU is needed. Exits with 3 if a row is rejected.
    """
    from training_backends.cli.exit_codes import ExitCode
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.data import preview_document, show_preview
    from training_backends.client.config_file import load_config
    from training_backends.tokens.preview import preview as preview_rows

    file = load_config(config)
    local, _ = _fetched(file.config)
    examples = [*preview_rows(local, rows=rows, seq_len=_seq_len(file))]
    if json:
        write_json({"model": file.config.model, "rows": list(map(preview_document, examples))})
    else:
        show_preview(examples)
    if any(example.reason for example in examples):
        raise typer.Exit(ExitCode.INVALID)


def _seq_len(file: "ConfigFile") -> int | None:
    """Return the sequence length; the default of the local backend if it trains the model."""
    from training_backends.backends.local.spec import resolved_values

    if file.backend not in {None, "local"}:
        return file.config.hyperparameters.seq_len
    return int(resolved_values(file.config)["seq_len"])


_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)

FilesArgument = Annotated[
    list[Path],
    typer.Argument(metavar="FILE", help="Files, glob patterns, directories, or - for stdin."),
]
ProviderFormatOption = Annotated[
    str,
    typer.Option(
        "--provider-format",
        metavar="NAME",
        help="Provider format: mistral, openai, together or local.",
        autocompletion=complete_format,
    ),
]
DirectoryOption = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Output directory. Default: next to the input file."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]


def repair(
    files: FilesArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Output file. Default: NAME.repaired.jsonl."
        ),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Replace the file; the original is backed up to FILE.orig."
        ),
    ] = False,
    drop_invalid: Annotated[
        bool, typer.Option("--drop-invalid", help="Remove rows that cannot be repaired.")
    ] = False,
    provider_format: ProviderFormatOption = "mistral",
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Fix data files without changing their meaning.

    Rows that cannot be repaired are kept unchanged; the command then exits with 3. With --json,
    prints one line per repair, issue and file.
    """
    from training_backends.cli.exit_codes import ExitCode, UsageError
    from training_backends.cli.views.console import stdout
    from training_backends.cli.views.data import RepairLines, RepairView, bar
    from training_backends.datasets.open_file import STDIN, expand
    from training_backends.datasets.repair import repair as repair_file
    from training_backends.datasets.write import name_of

    rules = provider_format_named(provider_format)
    paths = expand(files)
    if output and (in_place or len(paths) > 1):
        raise UsageError("--output requires a single file and cannot be combined with --in-place.")
    if STDIN in paths and (in_place or not output):
        raise UsageError("Reading from standard input requires --output.")
    if output and output.name.endswith((".gz", ".zst", ".parquet")):
        raise UsageError(f"Output is uncompressed JSON Lines: use .jsonl, not {output.suffix}.")
    invalid = 0
    for path in paths:
        view = RepairLines() if json else RepairView(stdout())
        target = output or path.with_name(f"{name_of(path)}.repaired.jsonl")
        with bar("repairing") as progress:
            done = repair_file(
                path,
                None if in_place else target,
                provider_format=rules,
                drop_invalid=drop_invalid,
                force=force,
                on_repair=view.repair,
                on_issue=view.issue,
                on_progress=progress,
            )
        view.finish(done)
        invalid += done.invalid
    if invalid:
        raise typer.Exit(ExitCode.INVALID)


def convert(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Files and directories of data.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Output file.")],
    prompt: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column with the user's text.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column with the assistant's text.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column with the system message.")
    ] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out rows that cannot be converted.")
    ] = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Convert data of other tools to JSON Lines of chats.

    Reads Alpaca, ShareGPT, Gemini, prompts with answers; as JSON Lines, a JSON array, CSV, TSV,
    Parquet or a saved Hugging Face dataset. Exits with 3 if a row cannot be converted.
    """
    from training_backends.cli.exit_codes import UsageError
    from training_backends.cli.views.console import write_json
    from training_backends.cli.views.data import show_converted
    from training_backends.datasets.foreign import Columns, convert_data

    if bool(prompt) != bool(answer) or (system and not prompt):
        raise UsageError("Pass --prompt and --answer together; --system needs both.")
    if output.name.endswith((".gz", ".zst", ".parquet")):
        raise UsageError(f"Output is uncompressed JSON Lines: use .jsonl, not {output.suffix}.")
    done = convert_data(
        files,
        output,
        columns=Columns(prompt, answer, system),
        skip_invalid=skip_invalid,
        force=force,
    )
    if json:
        write_json(
            {
                "path": done.path,
                "rows": done.rows,
                "formats": done.formats,
                "left_out": [str(issue) for issue in done.issues],
            }
        )
    else:
        show_converted(done)


def split(
    files: FilesArgument,
    fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Fraction of rows for validation. Default: the provider's limit.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of rows for validation.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the split.")] = 0,
    directory: DirectoryOption = None,
    provider_format: ProviderFormatOption = "mistral",
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Split data files into NAME.train.jsonl and NAME.validation.jsonl.

    The split is deterministic for the same rows and seed, and identical rows never end up in
    both parts. Several files are split as one data set.
    """
    from training_backends.cli.exit_codes import UsageError
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.cli.views.data import bar, show_data, show_split
    from training_backends.cli.views.render import show_note
    from training_backends.datasets.open_file import expand
    from training_backends.datasets.split import split as split_files

    if fraction is not None and rows is not None:
        raise UsageError("Pass either --fraction or --rows, not both.")
    rules = provider_format_named(provider_format)
    with bar("splitting") as progress:
        found = split_files(
            expand(files),
            provider_format=rules,
            fraction=fraction,
            rows=rows,
            seed=seed,
            directory=directory,
            force=force,
            on_progress=progress,
        )
    train = [each.train for each in found if each.train]
    validation = [each.validation for each in found if each.validation]
    note = _note(train, validation, rules)
    data = {
        "train": [str(side.path) for side in train],
        "validation": [str(side.path) for side in validation],
    }
    if json:
        documents = [
            {
                "source": each.source,
                "train": each.train and each.train._asdict(),
                "validation": each.validation and each.validation._asdict(),
            }
            for each in found
        ]
        write_json({"files": documents, "note": note, "data": data})
        return
    for each in found:
        show_split(each, stderr())
    if note:
        show_note(note)
    show_data(data)


def shard(
    files: FilesArgument,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="SIZE",
            help="Maximum file size, such as 100MB. Default: the provider's limit.",
        ),
    ] = None,
    weight: Annotated[
        float,
        typer.Option(
            metavar="WEIGHT", help="Weight of the input files in the printed configuration."
        ),
    ] = 1.0,
    directory: DirectoryOption = None,
    provider_format: ProviderFormatOption = "mistral",
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Split data files into shards no larger than a limit.

    They are named NAME-00001-of-00007.jsonl and so on. Rows are never truncated: concatenated,
    the shards are byte-identical to the decompressed file.
    """
    from training_backends.cli.exit_codes import UsageError
    from training_backends.cli.views.console import stderr, write_json
    from training_backends.cli.views.data import bar, show_data, show_shards
    from training_backends.datasets.open_file import expand
    from training_backends.datasets.shard import shard as shard_file

    if weight <= 0:
        raise UsageError("--weight must be greater than 0.")
    rules = provider_format_named(provider_format)
    most = read_size(limit) if limit is not None else rules.max_file_bytes
    if most is None:
        raise UsageError(f"{rules.name} has no file size limit: pass --limit.")
    found: dict[Path, Sequence[ShardFile]] = {}
    for path in expand(files):
        with bar("sharding") as progress:
            found[path] = shard_file(
                path, most, directory=directory, force=force, on_progress=progress
            )
    parts = [part for each in found.values() for part in each]
    data = {
        "train": [
            str(part.path) if weight == 1 else {"path": str(part.path), "weight": weight}
            for part in parts
        ]
    }
    if json:
        documents = [
            {"source": path, "files": [part._asdict() for part in each]}
            for path, each in found.items()
        ]
        write_json({"limit": most, "files": documents, "data": data})
        return
    for path, each in found.items():
        show_shards(path, each, stderr())
    show_data(data)


def provider_format_named(name: str) -> "ProviderFormat":
    """Return the provider format of this name."""
    from training_backends.cli.exit_codes import UsageError
    from training_backends.datasets.provider_formats import PROVIDER_FORMATS

    if name not in PROVIDER_FORMATS:
        raise UsageError(
            f"Unknown provider format {name!r}.", hint=f"Choose from {', '.join(PROVIDER_FORMATS)}."
        )
    return PROVIDER_FORMATS[name]


def read_size(text: str) -> int:
    """Parse a size in bytes; MB is 10**6 bytes, MiB is 2**20."""
    from training_backends.cli.exit_codes import UsageError

    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"Invalid size {text!r}.", hint="Use 100MB, 1.5GB or 64MiB.")
    base = 1024 if found["binary"] else 1000
    size = int(float(found["number"]) * base ** " kmgt".index(found["unit"].lower() or " "))
    if size < 1:
        raise UsageError("The size must be at least 1 byte.", hint="Use 100MB, 1.5GB or 64MiB.")
    return size


def _note(
    train: "Sequence[SplitFile]",
    validation: "Sequence[SplitFile]",
    provider_format: "ProviderFormat",
) -> str | None:
    """Return a warning if the provider would reject a validation set of this size."""
    size = sum(side.size for side in validation)
    share = size / sum(side.size for side in train)
    most, most_share = provider_format.validation_max_bytes, provider_format.validation_max_share
    if not ((most and size > most) or (most_share and share > most_share)):
        return None
    limits = [f"{most:,} bytes"] if most else []
    limits += [f"{most_share:.0%} of the training set"] if most_share else []
    return (
        f"the validation set is too large for {provider_format.name}, which allows at most "
        f"{' and '.join(limits)}; it has {size:,} bytes, {share:.1%}"
    )


data = typer.Typer(
    help="Inspect, preview, convert, repair, split and shard data.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
data.command()(inspect)
data.command()(preview)
data.command()(repair)
data.command()(convert)
data.command()(split)
data.command()(shard)
