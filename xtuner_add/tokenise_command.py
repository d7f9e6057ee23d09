"""``xtuner-add tokenise``."""

from __future__ import annotations

from pathlib import Path

import click

from xtuner_add.dataset_commands import FILE, OUT, end
from xtuner_add.release_commands import user_errors


@click.command("tokenise")
@click.argument("conversations", type=FILE)
@click.argument("out", type=OUT)
@click.option("--config", help="Training config whose tokenizer, template and length are used.")
@click.option("--tokenizer", help="Instead: folder or hub name.")
@click.option("--prompt-template", default="llama3_chat", show_default=True)
@click.option(
    "--map-fn",
    type=click.Choice(["llava", "interleaved"]),
    default="llava",
    show_default=True,
    help="llava moves the image to the front, as published.",
)
@click.option("--max-length", default=2048 - 196, show_default=True)
@click.option("--num-proc", type=int, help="[default: by the number of rows]")
def tokenise(
    conversations: Path,
    out: Path,
    config: str | None,
    tokenizer: str | None,
    prompt_template: str,
    map_fn: str,
    max_length: int,
    num_proc: int | None,
) -> None:
    """Tokenise CONVERSATIONS once and write the folder OUT.

    Training reads it as `offline_processed_text_folder` and starts at once. Rows that could not be
    used are in OUT/skipped_samples.jsonl, and the exit code is then 3.
    """
    if (config is None) == (tokenizer is None):
        raise click.UsageError("either --config or --tokenizer expected")
    from pallava.engine.tokenised import settings_from_config, settings_from_names
    from pallava.engine.tokenised import tokenise as write_folder
    from xtuner_add.paths import find_config

    with user_errors():
        if config is not None:
            settings = settings_from_config(find_config(config))
        else:
            assert tokenizer is not None
            settings = settings_from_names(
                tokenizer, prompt_template, map_fn=map_fn, max_length=max_length
            )
        report = write_folder(conversations, out, settings, num_proc=num_proc)
    click.echo(f"Wrote {out}: {report['num_rows']:,} rows, {report['num_tokens']:,} tokens")
    end(report["num_skipped"], out)
