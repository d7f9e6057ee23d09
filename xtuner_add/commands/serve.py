"""`xtuner-add chat` and `xtuner-add serve`: chat with a trained model."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

import click

from pallava.serving.guard import LOOPBACK_HOSTS, GuardSettings
from xtuner_add.commands.evaluate import load_from_options, model_options
from xtuner_add.commands.options import FRACTION, POSITIVE_OR_0, example, refuse_unused

API_KEY_VARIABLE = "XTUNER_ADD_API_KEY"

_EXPECTED_ERRORS = (ValueError, FileNotFoundError)
_MIN_KEY_LENGTH = 16
_MAX_CONNECTIONS = 256


@click.command("chat", epilog=example("chat", "model --image image.png"))
@model_options
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Image for the first question; may be repeated.",
)
@click.option("--system", help="System prompt, for models that were trained with one.")
@click.option("--max-new-tokens", default=1200, show_default=True)
@click.option(
    "--temperature",
    type=POSITIVE_OR_0,
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 decodes greedily.",
)
@click.option("--top-p", type=FRACTION, default=1.0, show_default=True)
@click.option(
    "--seed", type=int, help="Sampling seed, for reproducible answers with --temperature."
)
@click.pass_context
def chat(
    ctx: click.Context,
    images: tuple[Path, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    **options: Any,
) -> None:
    """Chat with a trained model in the terminal; answers are streamed.

    LLM is an exported folder, or the language model with the other parts in --llava and
    --visual-encoder. Questions can also be piped in, one per line. `/help` lists the commands. The
    exit code is 1 if a line could not be answered.
    """
    from pallava.inference.streaming import Sampling
    from xtuner_add.commands.terminal_chat import TerminalChat

    if not temperature:
        refuse_unused(ctx, ("top_p", "seed"), "without --temperature")
    try:
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    except ValueError as error:
        raise click.UsageError(str(error), ctx) from error
    try:
        num_errors = TerminalChat(load_from_options(options), sampling, system).run(images)
    except _EXPECTED_ERRORS as error:
        raise click.ClickException(str(error)) from error
    ctx.exit(1 if num_errors else 0)


@click.command("serve", epilog=example("serve", "model --slides slides/"))
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535))
@click.option(
    "--slides",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of slides whose regions the page can show; for a model of slides, those that it "
    "may be asked about.",
)
@click.option("--name", help="Name of the model for clients. [default: name of the folder]")
@click.option("--max-upload-mib", default=64, show_default=True, type=click.IntRange(1, 4096))
@click.option(
    "--max-megapixels",
    default=100,
    show_default=True,
    type=click.IntRange(1, 400),
    help="Limit for all images of one request together.",
)
@click.option(
    "--max-running",
    default=32,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Limit for the answers that are generated together.",
)
@click.option(
    "--max-waiting",
    default=32,
    show_default=True,
    type=click.IntRange(0, 1000),
    help="Limit for the answers queued behind them; further requests are refused.",
)
@click.option(
    "--cache-mib",
    default=4096,
    show_default=True,
    type=click.IntRange(0, 1 << 20),
    help="Limit for keys and values of running answers and kept conversations.",
)
@click.option(
    "--api-key-env",
    metavar="VARIABLE",
    help=f"Environment variable that holds the API key. [default: {API_KEY_VARIABLE}, if set]",
)
@click.option(
    "--allow-anonymous", is_flag=True, help="Accept requests without an API key on any --host."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Host name that requests may use, such as that of a proxy; may be repeated.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    host: str,
    port: int,
    slides: Path | None,
    name: str | None,
    max_upload_mib: int,
    max_megapixels: int,
    max_running: int,
    max_waiting: int,
    cache_mib: int,
    api_key_env: str | None,
    allow_anonymous: bool,
    allowed_hosts: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve a trained model: a web page and an OpenAI-compatible endpoint.

    LLM is an exported folder, or the language model with the other parts in --llava and
    --visual-encoder. Only this machine can connect, unless --host says otherwise, which requires an
    API key. For research only, not for diagnosis.
    """
    key = _api_key(ctx, api_key_env)
    own_names = _own_names(ctx, host, allow_anonymous or key is not None)

    settings = GuardSettings(
        hosts=(*own_names, *map(str.lower, allowed_hosts)),
        api_key=key,
        max_upload_bytes=max_upload_mib << 20,
    )
    with _listen(host, port) as listening:
        from pallava.serving.service import ModelService

        assistant, source = _load(options, slides)
        service = ModelService(
            assistant,
            name or Path(options["llm"]).resolve().name,
            max_waiting,
            max_running,
            cache_mib << 20,
        )
        address = f"http://{_bracketed(host)}:{listening.getsockname()[1]}"
        _serve_until_stopped(
            service, settings, source, max_megapixels * 1_000_000, listening, address
        )


def _own_names(ctx: click.Context, host: str, is_guarded: bool) -> tuple[str, ...]:
    """Returns the host names of a loopback server; none for other hosts, which must be guarded."""
    if _is_loopback(host):
        return (*LOOPBACK_HOSTS, _bracketed(host))
    if not is_guarded:
        raise click.UsageError(
            f"--host {host} lets other machines connect: set an API key in the environment "
            f"variable {API_KEY_VARIABLE}, or give --allow-anonymous",
            ctx,
        )
    click.echo(
        f"Warning: traffic to {host} is not encrypted; images, answers and the API key can be "
        "intercepted. Use a proxy with TLS, or an SSH tunnel to 127.0.0.1.",
        err=True,
    )
    return ()


def _load(options: dict[str, Any], slides: Path | None) -> tuple[Any, Any]:
    """Loads the model, and opens the folder of slides."""
    from pallava.serving.slide_folder import SlideFolder

    try:
        source = SlideFolder(slides) if slides is not None else None
        assistant = load_from_options(options)
        if assistant.reads_slides and source is None:
            raise ValueError(
                f"{options['llm']}: reads slides; name the folder of those that it may be asked "
                "about with --slides"
            )
    except _EXPECTED_ERRORS as error:
        raise click.ClickException(str(error)) from error
    return assistant, source


def _api_key(ctx: click.Context, variable: str | None) -> str | None:
    key = os.environ.get(variable or API_KEY_VARIABLE, "").strip()
    if not key:
        if variable is None:
            return None
        raise click.UsageError(f"--api-key-env: the environment variable {variable} is empty", ctx)
    if len(key) < _MIN_KEY_LENGTH:
        raise click.UsageError(
            f"the API key in {variable or API_KEY_VARIABLE} is shorter than {_MIN_KEY_LENGTH} "
            "characters; `openssl rand -hex 24` makes one",
            ctx,
        )
    return key


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


def _listen(host: str, port: int) -> socket.socket:
    """Binds the port before the model is loaded, so that a port in use is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise click.ClickException(f"--host {host} --port {port}: {error}") from error
    return listening


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt  # so that the `finally` below deletes the uploads


def _serve_until_stopped(
    service: Any,
    settings: Any,
    slides: Any,
    max_pixels: int,
    listening: socket.socket,
    address: str,
) -> None:
    import uvicorn

    from pallava.serving.app import create_app
    from pallava.serving.connections import timed_protocol

    # Deprecation warnings about the libraries that Gradio calls are not actionable for the user.
    warnings.filterwarnings("ignore", module="gradio")
    signal.signal(signal.SIGTERM, _interrupt)
    folder = Path(tempfile.mkdtemp(prefix="xtuner-add-serve-"))
    try:
        app = create_app(
            service, settings, upload_folder=folder, slides=slides, max_pixels=max_pixels
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            http=timed_protocol(),
            timeout_graceful_shutdown=3,
        )
        listening.listen()
        click.echo(f"{service.name}: page at {address}/ , endpoint at {address}/v1")
        click.echo("For research only, not for diagnosis. Ctrl-C ends the server.")
        # After shutting down, uvicorn raises the signal again that stopped it.
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        click.echo("Stopped.")
    finally:
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)
