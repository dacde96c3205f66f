"""``accel serve``: options to a running server. Knows nothing of routes or of the engine."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from accel.cli.common import (
    DEFAULT_MODEL,
    Progress,
    artifact_option,
    options_option,
    parse_bytes,
    parse_options,
    use_threads,
)
from accel.errors import AccelError, ArtifactError, OptionError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from accel.server.run import Loaded

# what the extra `serve` brings: the module and the package's name
NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "llguidance": "llguidance",
}
# one character would be guessed; a space or a line end could not be sent
_KEY = re.compile(r"[!-~]{8,512}")
_ORIGIN = re.compile(r"\*|https?://[^/\s?#]+")


@click.command(short_help="Serve a model over HTTP, as OpenAI's API.")
@click.argument("model", required=False)
@artifact_option
@options_option
@click.option("--method", metavar="NAME", help="Decoding method, see `accel methods`. [default: the one for the model]")
@click.option(
    "--teacher",
    metavar="MODEL@URL",
    help="OpenAI-compatible endpoint for what the model's samples disagree on: NAME+cascade answers so.",
)
@click.option(
    "--cascade-option",
    "cascade_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of method 'cascade', see `accel methods`; repeatable. Without --teacher a cascade of the model alone.",
)
@click.option("--served-model-name", metavar="NAME", help="What clients call the model. [default: MODEL]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", "api_keys", multiple=True, metavar="KEY", help="Key that requests must bring; repeatable.")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keys, one a line: those of the command line are seen by everybody on the machine.",
)
@click.option(
    "--cors-origin", "cors_origins", multiple=True, metavar="URL", help="Web origin that may ask; repeatable."
)
@click.option(
    "--artifact-root",
    "artifact_roots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Cartridges in FOLDER may be named by requests, as those given with -a may; repeatable.",
)
@click.option("--max-rows", type=click.IntRange(min=1), default=16, show_default=True, help="Continuations at a time.")
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Continuations that may wait; the next request is told to come again later (429).",
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Prompt tokens that are read between two steps of the others.",
)
@click.option(
    "--prefix-cache",
    default="512MB",
    show_default=True,
    metavar="SIZE",
    help="Memory for the contexts of earlier requests; 0 keeps none.",
)
@click.option("--max-body", default="4MB", show_default=True, metavar="SIZE", help="Longest body of a request.")
@click.option("--max-n", type=click.IntRange(min=1), default=64, show_default=True, help="Most answers to a request.")
@click.option("--max-logprobs", type=click.IntRange(min=0), default=20, show_default=True, help="Most top_logprobs.")
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Requests that take longer are aborted. [default: no limit]",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="What running requests are given to finish when the server is told to end.",
)
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append the token ids of prompts and answers to FILE, for `accel distill draft --prompts FILE`. "
    "[default: none]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's choice]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
def serve(
    model: str | None,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    api_key_file: Path | None,
    cors_origins: tuple[str, ...],
    shutdown_timeout: float,
    **settings: Any,
) -> None:
    """Serve MODEL over HTTP, with the endpoints of OpenAI's API under /v1.

    Ready when a line on stderr says so; until then /health answers 503. SIGTERM or Ctrl-C ends it: requests under way
    are given --shutdown-timeout seconds, then aborted.
    """
    check_installed(NEEDED)
    keys = read_keys(api_keys, api_key_file)
    for origin in cors_origins:
        if not _ORIGIN.fullmatch(origin):
            raise OptionError(f"--cors-origin {origin}: must be http(s)://HOST[:PORT], or * for every page there is")
    settings |= {each: parse_bytes(settings[each]) for each in ("prefix_cache", "max_body")}
    name = settings.pop("served_model_name") or _short_name(model or DEFAULT_MODEL)
    begun = time.monotonic()

    from accel.server.run import run

    def load() -> Loaded:
        return _load(model or DEFAULT_MODEL, name, keys=keys, cors_origins=cors_origins, **settings)

    with Progress() as progress:

        def bound(url: str, beyond: bool) -> None:
            if beyond and not keys:
                open_to = f"{url} can be reached from other machines and asks for no key"
                click.echo(f"Warning: {open_to}: set --api-key-file", err=True)
            progress(f"loading {name} …")

        def ready(url: str) -> None:
            progress("")
            click.echo(f"{name} is ready at {url} (loaded in {time.monotonic() - begun:.1f} s)", err=True)

        run(load, host=host, port=port, shutdown_timeout=shutdown_timeout, on_bound=bound, on_ready=ready)


def _load(
    model: str,
    name: str,
    *,
    artifact: tuple[str, ...],
    options: dict[str, Any],
    method: str | None,
    teacher: str | None,
    cascade_options: tuple[str, ...],
    keys: frozenset[str],
    cors_origins: tuple[str, ...],
    artifact_roots: tuple[Path, ...],
    max_rows: int,
    max_queue: int,
    prefill_chunk: int,
    prefix_cache: int,
    max_body: int,
    max_n: int,
    max_logprobs: int,
    request_timeout: float | None,
    log: Path | None,
    threads: int | None,
    device: str,
    dtype: str,
) -> Loaded:
    """The model, an engine for it and the routes to that."""
    use_threads(threads)
    import accel
    from accel.engine import service as engine
    from accel.server.app import ServerSettings, create_app
    from accel.server.cascade import CascadePlan
    from accel.server.metrics import Metrics
    from accel.server.run import Loaded

    told = options if log is None else {**options, "log": log}
    plan, artifacts = CascadePlan.read(teacher, parse_options(cascade_options), artifact)
    loaded = accel.load(model, artifacts, device=device, dtype=dtype, method=method, **told)
    offer(loaded.model, artifact_roots)
    service = engine.serve(
        loaded, max_rows=max_rows, max_queue=max_queue, piece=prefill_chunk, prefix_bytes=prefix_cache
    )
    settings = ServerSettings(
        model_name=name,
        model_root=_short_name(model),
        api_keys=keys,
        max_body_bytes=max_body,
        max_n=max_n,
        max_logprobs=max_logprobs,
        request_timeout=request_timeout,
        cors_origins=cors_origins,
    )
    try:
        desk = None if plan is None else plan.desk(service, loaded, settings)
        return Loaded(create_app(service, loaded, settings, Metrics(name, service), desk), service)
    except BaseException:
        service.close()
        raise


def offer(model: PreTrainedModel, roots: Iterable[Path]) -> None:
    """Put the cartridges of some folders into the model's store, from which requests name them."""
    import accel
    from accel.artifacts import list_artifacts, read_manifest

    for root in roots:
        cartridges = [each for each in list_artifacts([root]) if read_manifest(each.path).kind == "cartridge"]
        if not cartridges:
            raise OptionError(f"--artifact-root {root}: holds no cartridge; name a folder of artifacts that has some")
        for found in cartridges:
            try:
                accel.cartridges(model).add(found.path)
            except ArtifactError as error:
                # a folder may serve several models
                click.echo(f"Warning: cartridge {found.id} is not offered: {first_line(error)}", err=True)


def check_installed(needed: dict[str, str]) -> None:
    """Refuse to start without the packages of the extra ``serve``."""
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise AccelError(f"accel serve needs {', '.join(missing)}: pip install accel-runtime[serve]")


def read_keys(given: Iterable[str], file: Path | None) -> frozenset[str]:
    """The keys of the command line and of a file, whose lines may be empty or begin with #."""
    keys = [*given]
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        from_file = [line for line in lines if line and not line.startswith("#")]
        if not from_file:
            raise OptionError(f"--api-key-file {file}: holds no key, so that everybody could ask; write one a line")
        keys += from_file
    for key in keys:
        if not _KEY.fullmatch(key):
            raise OptionError("an API key must have 8 to 512 printable ASCII characters, without spaces")
    return frozenset(keys)


def _short_name(model: str) -> str:
    """A folder's own name: clients need not know where it lies."""
    return Path(model).resolve().name if Path(model).is_dir() else model
