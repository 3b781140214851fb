"""The command `llmrec`: run chapters, check data, list and fetch models."""

import signal
import sys

import click


class _Commands(click.Group):
    """Errors that the library raises on purpose are one message and exit status 1, without a traceback."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except (ValueError, OSError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """A study of fusing language models with personalised recommenders."""


@main.command()
@click.argument("chapters", nargs=-1, metavar="[CHAPTER]...")
@click.option("--profile", default="quick", help="Scale, an entry of profiles.yaml: quick or full.")
@click.option("-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter; repeatable.")
@click.option("--engine", type=click.Choice(["local", "dask"]), default="local", help="Where chapters run.")
@click.option("-j", "--jobs", "at_once", type=click.IntRange(1), default=1, help="Chapters side by side, if local.")
@click.option("--scheduler", metavar="URL", help="A running dask scheduler; without it one worker is started here.")
@click.option("--results", "results_dir", metavar="DIR", help="Folder for tables (the parameter results_dir).")
@click.option("--executed", "executed_dir", default="_build/executed", metavar="DIR", help="For executed notebooks.")
@click.option("--notebooks", "notebooks_dir", default="notebooks", metavar="DIR", help="Folder of the chapters.")
@click.option("--cell-timeout", type=click.IntRange(0), default=0, help="Seconds that a cell may take; 0: no limit.")
@click.option("--cache-gb", type=click.FloatRange(0), envvar="LLMREC_CACHE_GB", help="First shrink the cache to it.")
@click.option("--force", is_flag=True, help="Execute also chapters that are up to date.")
def run(parameters: tuple[tuple[str, str], ...], **options: object) -> None:
    """Execute chapters ("06", "fusion" or "06_fusion"; all, if none is named), skipping those that are up to date.

    Nothing is executed if any parameter of any chapter is unknown or of the wrong type.
    """
    from llmrec_lib import study

    names = [name for name, _ in parameters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"-p is given more than once for {', '.join(sorted(twice))}")
    # Ends like Ctrl-C, so that the kernel is shut down and no half-written file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = study.run(parameters=dict(parameters), report=click.echo, **options)
    if failed := [outcome.chapter for outcome in outcomes if outcome.status == "failed"]:
        raise click.ClickException(f"{len(failed)} of {len(outcomes)} chapters failed: {', '.join(failed)}")


@main.command()
@click.option("--shrink", type=click.FloatRange(0), metavar="GB", help="Delete what was not used for longest first.")
def cache(shrink: float | None) -> None:
    """Show what is kept for later runs, by kind: downloaded models, embeddings, trained models and so on."""
    from llmrec_lib.cache import cache_dir, cache_entries, shrink_cache

    if shrink is not None:
        click.echo(f"{shrink_cache(shrink) / 1e6:,.1f} MB deleted")
    entries = cache_entries()
    for kind in sorted({kind for kind, *_ in entries}):
        sizes = [size for own, _, size, _ in entries if own == kind]
        click.echo(f"{kind:<12} {len(sizes):>7,} entries {sum(sizes) / 1e6:>11,.1f} MB")
    click.echo(f"in {cache_dir()}: {sum(size for _, _, size, _ in entries) / 1e6:,.1f} MB")


@main.group()
def data() -> None:
    """Check your own data."""


@data.command()
@click.argument("path")
def check(path: str) -> None:
    """Read the data set in the folder PATH (NAME/NAME.inter and, if there are any, .item and .user) and describe it."""
    from llmrec_lib.datasets import describe, load_folder

    dataset = load_folder(path)
    click.echo("\n".join([describe(dataset).to_string(), *(f"note: {note}" for note in dataset.notes)]))


@main.group()
def models() -> None:
    """The language models that the study knows by name."""


@models.command("list")
def list_() -> None:
    """Names, sizes and sources of the models."""
    from llmrec_lib.language_models.catalog import list_models

    click.echo(list_models().to_string(index=False))


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def fetch(names: tuple[str, ...]) -> None:
    """Fetch models, so that later runs need no network."""
    from llmrec_lib.language_models import catalog

    for name in names:
        click.echo(f"{name}: {catalog.fetch(name)}")
