"""Mutates inputs at random and counts how the readers answer.

Not collected by pytest. Run one area, or all, for a time and from a seed::

    python tests/fuzz/fuzz.py slides checkpoints rows replies choices http --seconds 300 --seed 1

Every case runs in a forked process with a memory limit and a time limit, so that a crash, a hang
or a runaway allocation is counted rather than ending the run. The outcomes:

- ``ok``: the input was read, and the result is right as far as the case can tell.
- ``error``: an error class that commands turn into one line.
- ``traceback``: any other exception.
- ``wrong``: the input was read without an error, but the result is not what it must be.
- ``hang`` and ``crash``: the process did not end in time, or was killed by a signal.

A case is determined by its area, the seed and its number, which are printed for each finding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# A distribution may have installed a package `tests` of its own, which would hide this folder.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

MEMORY_BYTES = 8 << 30
LIMIT_S = 30.0
Case = Callable[[random.Random, Path], str]


class WrongResultError(Exception):
    """The reader accepted an input and returned something that it must not return."""


def mutate(rng: random.Random, data: bytes, *, head: int | None = None) -> bytes:
    """Returns `data` with a few random edits, all of them in its first `head` bytes if given."""
    out = bytearray(data)
    end = min(head or len(out), len(out))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        kind = rng.randrange(6)
        at = rng.randrange(end)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            width = rng.choice([2, 4, 8])
            value = rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1])
            out[at : at + width] = (value & (256**width - 1)).to_bytes(width, "little")
        elif kind == 3 and head is None and len(out) > 1:
            del out[rng.randrange(1, len(out)) :]
            end = min(end, len(out))
        elif kind == 4:
            stop = min(end, at + rng.randrange(1, 64))
            out[at:stop] = bytes(stop - at)
        else:
            other = rng.randrange(end)
            out[at], out[other] = out[other], out[at]
        if not out:
            return b""
    return bytes(out)


# --- slides -------------------------------------------------------------------------------------


def slides_case(folder: Path) -> Case:
    """Slide files with mutated directories or cut ends, opened, found tissue in, and read."""
    import tifffile

    from tests.wsi.slides import tissue_pixels, write_svs
    from wsi.openers import SlideError
    from wsi.reader import Region, Slide

    pixels = tissue_pixels(1024, 768, seed=3)
    sources = [write_svs(folder / "a.svs", pixels), folder / "b.tiff", folder / "c.ome.tif"]
    tifffile.imwrite(
        sources[1], pixels, photometric="rgb", compression="deflate",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    tifffile.imwrite(
        sources[2], pixels, photometric="rgb", tile=(256, 256), ome=True,
        metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5},
    )  # fmt: skip

    def case(rng: random.Random, work: Path) -> str:
        source = rng.choice(sources)
        data = source.read_bytes()
        cut = rng.random() < 0.3
        changed = data[: rng.randrange(1, len(data))] if cut else mutate(rng, data)
        path = work / source.name
        path.write_bytes(changed)
        try:
            with Slide(path) as slide:
                width, height = slide.dimensions
                regions = [
                    Region(x, y, 256, 256)
                    for x, y in ((0, 0), (512, 256), (max(0, width - 256), max(0, height - 256)))
                ]
                slide.thumbnail(256)
                results = list(slide.read_many(regions))
        except SlideError:
            return "error"
        for result in results:
            if isinstance(result, np.ndarray) and result.shape != (256, 256, 3):
                raise WrongResultError(f"region of shape {result.shape}")
        if changed == data and any(isinstance(result, Exception) for result in results):
            raise WrongResultError("a sound slide gave an error")
        if cut and (width, height) == (1024, 768):
            whole = pixels[:256, :256].astype(int)
            first = results[0]
            if isinstance(first, np.ndarray) and np.abs(first.astype(int) - whole).mean() > 12:
                raise WrongResultError("a truncated slide gave other pixels without an error")
        return "ok"

    return case


# --- checkpoints --------------------------------------------------------------------------------


def checkpoints_case(folder: Path) -> Case:
    """Checkpoints whose structure was mutated: read whole, or refused."""
    import safetensors.torch
    import torch

    from pathcore.weights import CheckpointError, read_state_dict

    torch.manual_seed(0)
    state = {f"layer{i}.weight": torch.randn(8, 5 + i) for i in range(4)}
    files = [folder / "a.safetensors", folder / "b.pth", folder / "c.pth", folder / "d.bin"]
    safetensors.torch.save_file(state, files[0])
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, files[1])
    torch.save({"model": state, "optimizer": {"lr": 1e-3}}, files[2])
    torch.save(state, files[3], _use_new_zipfile_serialization=False)

    def case(rng: random.Random, work: Path) -> str:
        source = rng.choice(files)
        data = source.read_bytes()
        # Safetensors keep no checksum, so a changed value cannot be noticed: change the header.
        head = 8 + struct.unpack("<Q", data[:8])[0] if source.suffix == ".safetensors" else None
        changed = mutate(rng, data, head=head)
        path = work / source.name
        path.write_bytes(changed)
        try:
            found = read_state_dict(path)
        except CheckpointError:
            return "error"
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if source.suffix == ".pth" and changed != data:
            equal = shapes == {name: tuple(t.shape) for name, t in state.items()} and all(
                torch.equal(found[name], tensor) for name, tensor in state.items()
            )
            if not equal and set(shapes) == set(state):
                raise WrongResultError("values differ although the archive has checksums")
        return "ok"

    return case


# --- JSON lines ---------------------------------------------------------------------------------


def rows_case(folder: Path) -> Case:
    """Files of JSON lines: sound lines come back as they are, the others as reasons."""
    from pathcore.rows import read_rows_with_id

    def case(rng: random.Random, work: Path) -> str:
        rows = [{"id": f"r{i}", "image": f"{i}.png", "caption": "é" * i} for i in range(12)]
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        broken = set(rng.sample(range(12), rng.randrange(1, 5)))
        for i in broken:
            lines[i] = mutate(rng, lines[i]).replace(b"\n", b" ").replace(b"\r", b" ")
        path = work / "rows.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        try:
            found = dict(read_rows_with_id(path))
        except (ValueError, OSError):
            return "error"
        values = [found.get(i + 1) for i in range(12)]
        for i in range(12):
            if i not in broken and values[i] != rows[i]:
                raise WrongResultError(f"line {i + 1}: {values[i]!r}")
        return "ok"

    return case


# --- replies of captioning models ---------------------------------------------------------------

WORDS = (  # noqa: SIM905
    "glands lined by tall columnar epithelium with stratified nuclei and focal necrosis in a "
    "desmoplastic stroma infiltrated by lymphocytes and plasma cells near a dilated vessel"
).split()


def replies_case(folder: Path) -> Case:
    """Captions wrapped in what models add: the caption itself comes out, or a rejection."""
    from pathcore.chat_replies import ReplyError
    from pathgen.agents.captions import check_caption
    from pathgen.agents.replies import read_reply

    noise = ("<think>", "</think>", "<|im_end|>", "<|eot_id|>", "<image>", "```")

    def case(rng: random.Random, work: Path) -> str:
        caption = " ".join(rng.choices(WORDS, k=rng.randrange(22, 60))).capitalize() + "."
        before = rng.choice(
            ["", "<think>\nIt shows {x}.\n</think>\n", "<think></think>", "<image>\n", "\n\n", " "]
        ).replace("{x}", " ".join(rng.choices(WORDS, k=9)))
        after = rng.choice(["", "<|im_end|>", "<|eot_id|>", "</s>", "\n", "<|endoftext|>"])
        wrap = rng.choice(["{}", '"{}"', "```\n{}\n```", "```text\n{}\n```"])
        reply = before + wrap.format(caption) + after
        try:
            text = check_caption(read_reply(reply, None), min_words=10, max_words=250)
        except (ReplyError, ValueError):
            return "error"
        if any(token in text for token in noise):
            raise WrongResultError(f"{reply!r} -> {text!r}")
        if text.strip() != caption:
            raise WrongResultError(f"{reply!r} -> {text!r}")
        return "ok"

    return case


# --- letters of multiple choice -----------------------------------------------------------------


def choices_case(folder: Path) -> Case:
    """Answers that state one letter in many forms; never read as another letter."""
    from pallava.evaluation.metrics.choices import parse_choice

    options = {"A": "necrosis", "B": "fibrosis", "C": "mitotic figure", "D": "normal gland"}
    one = (
        "{L}", "{L}.", "({L})", "{L})", "**{L}**", "Answer: {L}", "The answer is {L}.",
        "The correct answer is ({L}).", "\\boxed{{{L}}}", "{L}: {T}", "{L}. {T}", "({L}) {T}",
        "I think {L}", "{L}\n\nExplanation: {O} is wrong.", "answer: {l} because of the nuclei",
        "<think>Maybe {O}? No.</think>{L}", "Option {L} is correct.", "{T}", "Final answer: {L}",
        "Option {O} is wrong, so it must be {L}", "The best option is **{L}**: {T}.",
    )  # fmt: skip
    none = (
        "A. B. C. D.", "({L}) and ({O})", "{L} or {O}", "A: necrosis B: fibrosis C: mitotic figure "
        "D: normal gland", "I cannot tell.", "", "Not {L}.", "It is not {L}: {T}", "no {T} is seen",
        "Neither {L} nor {O}.", "{L}, {O}", "Both {L} and {O}",
    )  # fmt: skip

    def case(rng: random.Random, work: Path) -> str:
        letter, other = rng.sample("ABCD", 2)
        form = rng.choice(one + none)
        text = form.format(L=letter, O=other, l=letter.lower(), T=options[letter])
        for decorate in (str.upper, str.strip, lambda t: f" {t}\n", lambda t: t):
            if rng.random() < 0.2 and "\\boxed" not in text:
                text = decorate(text)
        found = parse_choice(text, options)
        if form in none and found is not None:
            raise WrongResultError(f"{text!r} read as {found}")
        if form in one and found not in (letter, None):
            raise WrongResultError(f"{text!r} read as {found}")
        return "error" if found is None else "ok"

    return case


# --- HTTP requests ------------------------------------------------------------------------------


def http_case(folder: Path) -> Case:
    """Mutated requests to a running server: never a 5xx other than 503, and it stays alive."""
    from tests.pallava import goldens
    from tests.pallava.tiny_folders import make_folders
    from tests.xtuner_add.served_model import served

    root = make_folders(folder / "root", goldens.CROSSATTN_STATE)
    running = served(root, "--name", "tiny")
    server = running.__enter__()
    CLEANUP.append(lambda: running.__exit__(None, None, None))
    body = json.dumps(
        {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi?"}]}
    ).encode()

    def ask(raw: bytes) -> int:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(raw)
            answer = connection.recv(65536)
        return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0

    def case(rng: random.Random, work: Path) -> str:
        sent = mutate(rng, body) if rng.random() < 0.7 else body
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
            "Connection: close\r\n\r\n"
        ).encode()
        if rng.random() < 0.4:
            head = mutate(rng, head)
        status = ask(head + sent)
        if status >= 500 and status != 503:
            raise WrongResultError(f"status {status} for {(head + sent)!r}")
        health = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n"
        if ask(health % server.port) != 200:
            raise WrongResultError("the server no longer answers")
        return "ok" if status == 200 else "error"

    return case


CLEANUP: list[Callable[[], None]] = []
AREAS: dict[str, Callable[[Path], Case]] = {
    "slides": slides_case,
    "checkpoints": checkpoints_case,
    "rows": rows_case,
    "replies": replies_case,
    "choices": choices_case,
    "http": http_case,
}


def _child(case: Case, seed: str, work: Path, send: Any, *, limit_memory: bool) -> None:
    if limit_memory:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        send.send((case(random.Random(seed), work), ""))
    except WrongResultError as error:
        send.send(("wrong", str(error)))
    except BaseException:
        send.send(("traceback", traceback.format_exc()))


def run_area(name: str, seconds: float, seed: int) -> Counter[str]:
    """Runs cases of one area until the time is over, and prints what is not `ok` or `error`."""
    counts: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as root:
        case = AREAS[name](Path(root))
        deadline, number = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            work = Path(root) / "case"
            work.mkdir()
            receive, send = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(case, f"{name}/{seed}/{number}", work, send),
                kwargs={"limit_memory": name == "slides"},
            )  # fmt: skip
            child.start()
            send.close()
            try:
                if receive.poll(LIMIT_S):
                    outcome, detail = receive.recv()
                else:
                    outcome, detail = "hang", ""
                    child.kill()
            except EOFError:  # the child died before it could report
                outcome, detail = "crash", ""
            child.join()
            if outcome == "crash" and child.exitcode:
                detail = signal.Signals(-child.exitcode).name if child.exitcode < 0 else ""
            counts[outcome] += 1
            if outcome not in ("ok", "error"):
                print(f"{name}/{seed}/{number}: {outcome}: {detail[-1500:]}", flush=True)
            shutil.rmtree(work, ignore_errors=True)
            number += 1
    while CLEANUP:
        CLEANUP.pop()()
    return counts


def main() -> None:
    """Runs the areas named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("areas", nargs="*", default=list(AREAS), choices=[[], *AREAS][1:] or None)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each area")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.areas:
        print(f"{name}: {dict(run_area(name, options.seconds, options.seed))}", flush=True)


if __name__ == "__main__":
    main()
