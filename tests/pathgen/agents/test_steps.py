"""Steps through a real HTTP server that fails, stalls and returns invalid replies."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pathcore.chat_backends import AgentError, OpenAIBackend, Sampling
from pathcore.chat_budget import Budget, Spent
from pathcore.chat_cache import ReplyCache
from pathgen.agents.captions import describe, revise, summarise
from pathgen.agents.steps import StepReport, run_step, skipped_path
from tests.fake_server import PROMPT_TOKENS, REPLY_TOKENS
from tests.pathgen import agents_killed
from tests.pathgen.conftest import patch_rows, read_rows, write_rows
from tests.pathgen.describer_server import WORDS, DescriberServer, user_text


def ask(
    server: DescriberServer, folder: Path, *captions: str, step: Any = None, **changes: Any
) -> tuple[StepReport, list[dict[str, Any]]]:
    source = write_rows(folder / "pairs.jsonl", patch_rows(*captions))
    names = ("concurrency", "timeout_s", "max_retries", "sampling", "structured", "model")
    settings = {name: changes.pop(name) for name in names if name in changes}
    backend = OpenAIBackend(**({"base_url": server.url, "model": "m", "max_retries": 3} | settings))
    report = run_step(
        step or describe(), backend, source, folder / "out.jsonl",
        images=folder / "images", progress=False, **changes,
    )  # fmt: skip
    backend.close()
    return report, read_rows(folder / "out.jsonl")


@pytest.mark.usefixtures("patches")
def test_rows_keep_order_and_say_where_they_come_from(
    server: DescriberServer, tmp_path: Path
) -> None:
    captions = [f"case {number}" for number in range(30)]
    report, rows = ask(server, tmp_path, *captions, concurrency=4)
    assert report.complete
    assert report.counts == {"rows": 30, "written": 30}
    assert report.spent.tokens == 30 * (PROMPT_TOKENS + REPLY_TOKENS)
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(30)]
    assert [row["caption"] for row in rows] == [f"{WORDS} Field {n}." for n in range(30)]
    assert rows[3]["versions"] == {"source": "case 3", "describe": rows[3]["caption"]}
    (origin,) = rows[3]["provenance"]
    assert origin["model"] == "m"
    assert origin["prompt_sha256"] == describe().prompts["describe"].digest
    assert origin["parameters"]["temperature"] == 0
    assert origin["parents"][0]["id"] == "p3"
    assert server.keys == {"Bearer secret"}
    assert 1 <= server.most_running <= 4
    assert not read_rows(skipped_path(tmp_path / "out.jsonl"))
    for path in tmp_path.iterdir():
        assert not path.is_file() or b"secret" not in path.read_bytes()


@pytest.mark.usefixtures("patches")
def test_the_image_is_sent_whole(server: DescriberServer, tmp_path: Path) -> None:
    import base64

    Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / "1.png", "TIFF")
    ask(server, tmp_path, "case 0", "case 1", concurrency=1)
    urls = [body["messages"][1]["content"][0]["image_url"]["url"] for body in server.bodies]
    head, _, content = urls[0].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == (tmp_path / "images" / "0.png").read_bytes()
    assert base64.b64decode(urls[1].partition(",")[2]).startswith(b"\x89PNG")


@pytest.mark.usefixtures("patches")
def test_images_of_16_bits_or_with_transparency_are_shown_as_everywhere(
    server: DescriberServer, tmp_path: Path
) -> None:
    import base64
    import io

    import numpy as np

    from pathcore.chat_backends import open_image
    from pathcore.images import load_image

    folder = tmp_path / "images"
    deep = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(folder / "0.png", "TIFF")
    Image.fromarray(deep).save(folder / "1.png")
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(folder / "2.png")
    ask(server, tmp_path, "case 0", "case 1", "case 2", concurrency=1)
    for number, body in enumerate(server.bodies):
        url = body["messages"][1]["content"][0]["image_url"]["url"]
        shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        read = load_image(folder / f"{number}.png")
        assert (shown.mode, shown.tobytes()) == ("RGB", read.tobytes()), number
        assert open_image(folder / f"{number}.png").tobytes() == read.tobytes()


@pytest.mark.usefixtures("patches")
def test_a_file_without_rows_is_an_error(server: DescriberServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no rows"):
        ask(server, tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize("trouble", ["fail500", "fail429", "stall"])
def test_a_server_that_recovers_is_asked_again(
    server: DescriberServer, tmp_path: Path, trouble: str
) -> None:
    patience = {"timeout_s": 0.5, "max_retries": 8} if trouble == "stall" else {}
    report, rows = ask(server, tmp_path, f"[{trouble}] case 7", **patience)
    assert report.complete
    assert rows[0]["caption"].endswith("Field 7.")
    assert max(server.requests.values()) >= 3


FAULTS = {
    "always500": "InternalServerError",
    "bad400": "refused",
    "html": "no completion",
    "brokenjson": "no completion",
    "nochoices": "no completion",
    "short": "1 words; 20 to 250 are asked for",
    "refusal": "it declines",
    "leak": "texts that the reader does not know",
    "cut": "cut off",
    "control": "character",
    "surrogate": "character",
    "empty": "empty",
}


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_left_out_and_asked_anew(
    server: DescriberServer, tmp_path: Path, fault: str
) -> None:
    report, rows = ask(server, tmp_path, f"[{fault}]", "case 7", max_retries=0)
    assert not report.complete
    assert [row["id"] for row in rows] == ["p1"]
    (left,) = read_rows(report.skipped)
    assert (left["line"], left["id"], left["kind"]) == (1, "p0", "failed")
    assert FAULTS[fault] in left["reason"]
    before = dict(server.requests)
    report, rows = ask(server, tmp_path, f"[{fault}]", "case 7", max_retries=0)
    assert report.counts["from cache"] == 1
    assert {text: server.requests[text] > count for text, count in before.items()} == {
        text: f"[{fault}]" in text for text in before
    }


@pytest.mark.usefixtures("patches")
def test_a_model_is_told_what_is_wrong_with_its_reply(
    server: DescriberServer, tmp_path: Path
) -> None:
    report, _ = ask(server, tmp_path, "[once] case 5")
    assert report.complete
    messages = server.bodies[-1]["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert "it declines" in messages[-1]["content"]


@pytest.mark.usefixtures("patches")
def test_nothing_is_asked_twice(server: DescriberServer, tmp_path: Path) -> None:
    captions = [f"case {number}" for number in range(10)]
    ask(server, tmp_path, *captions[:6])
    first = (tmp_path / "out.jsonl").read_bytes()
    report, _ = ask(server, tmp_path, *captions)
    assert report.counts["from cache"] == 6
    assert (tmp_path / "out.jsonl").read_bytes().startswith(first)
    assert set(server.requests.values()) == {1}
    ask(server, tmp_path, *captions, sampling=Sampling(temperature=0.5))
    assert set(server.requests.values()) == {2}


@pytest.mark.usefixtures("patches")
def test_equal_rows_are_asked_about_once(server: DescriberServer, tmp_path: Path) -> None:
    report, rows = ask(server, tmp_path, *["case 1"] * 21)  # ten images
    assert report.counts["written"] == 21
    assert sum(server.requests.values()) == 10
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(21)]


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize("ceiling", ["max_cost", "max_tokens"])
def test_ceilings_hold_and_higher_ones_continue(
    server: DescriberServer, tmp_path: Path, ceiling: str
) -> None:
    captions = [f"case {number}" for number in range(12)]
    each = PROMPT_TOKENS + REPLY_TOKENS
    prompt = describe().prompts["describe"]
    num_bytes = len((prompt.system + prompt.fill({"caption": "case 11"})).encode())
    highest = 2 * (num_bytes + 100 + 1000 + 512) + 512 + 400  # two attempts, two texts in between
    most = highest + 4 * each
    limits = {"max_tokens": most} if ceiling == "max_tokens" else {"max_cost": most / 1e6}
    budget = Budget(price_in=1, price_out=1, image_tokens=1000, **limits)
    report, rows = ask(server, tmp_path, *captions, budget=budget)
    assert 0 < len(rows) < 12
    assert report.counts["not asked"] == 12 - len(rows)
    assert report.spent.tokens == len(rows) * each <= most
    assert not report.complete
    report, rows = ask(server, tmp_path, *captions, budget=Budget(price_in=1, price_out=1))
    assert report.complete
    assert report.spent.cost == pytest.approx(12 * each / 1e6)
    assert set(server.requests.values()) == {1}


@pytest.mark.usefixtures("patches")
def test_an_endpoint_that_counts_nothing_is_counted_at_the_most(
    server: DescriberServer, tmp_path: Path
) -> None:
    report, _ = ask(server, tmp_path, "[nousage] case 1", budget=Budget(image_tokens=5000))
    assert report.complete
    assert report.spent.tokens > 5000


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run(
    server: DescriberServer, tmp_path: Path, status: int
) -> None:
    server.refuse = status
    with pytest.raises(AgentError, match="m at http"):
        ask(server, tmp_path, *[f"case {n}" for n in range(10)], concurrency=1)
    assert sum(server.requests.values()) < 4


@pytest.mark.usefixtures("patches")
def test_a_dead_endpoint_ends_the_run_and_keeps_what_it_said(
    server: DescriberServer, tmp_path: Path
) -> None:
    captions = ["case 1", *[f"[always500] {n}" for n in range(60)]]
    with pytest.raises(AgentError, match="25 requests in a row without a reply"):
        ask(server, tmp_path, *captions, max_retries=0, concurrency=2)
    assert sum(server.requests.values()) < 40
    assert not (tmp_path / "out.jsonl").exists()
    assert ask(server, tmp_path, "case 1")[0].counts["from cache"] == 1


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ("filtered", "content filter withheld"),
        ("filter400", "refused: "),
        ("declined", "the model refuses: I will not."),
    ],
)
def test_verdicts_about_the_content_are_results(
    server: DescriberServer, tmp_path: Path, verdict: str, reason: str
) -> None:
    captions = [*[f"[{verdict}] case {n}" for n in range(40)], "case 99"]
    report, rows = ask(server, tmp_path, *captions, concurrency=2)
    assert [row["caption"] for row in rows] == [f"{WORDS} Field 99."]
    assert report.counts["failed"] == 40 and not report.complete
    assert all(reason in row["reason"] for row in read_rows(report.skipped))
    assert set(server.requests.values()) == {1}, "asked once, although two attempts are allowed"
    paid = 0 if verdict == "filter400" else 40
    assert report.spent.tokens == (paid + 1) * (PROMPT_TOKENS + REPLY_TOKENS)
    again, rows = ask(server, tmp_path, *captions)
    assert len(rows) == 1 and again.counts["failed"] == 40
    assert set(server.requests.values()) == {1}, "never paid for again"
    assert again.spent == report.spent


@pytest.mark.usefixtures("patches")
def test_a_reply_that_was_cut_off_is_not_asked_for_with_the_same_limit(
    server: DescriberServer, tmp_path: Path
) -> None:
    ask(server, tmp_path, "[cut] case 1")
    assert sum(server.requests.values()) == 1


@pytest.mark.usefixtures("patches")
def test_a_temperature_may_be_left_out(server: DescriberServer, tmp_path: Path) -> None:
    ask(server, tmp_path, "case 1", sampling=Sampling(temperature=None))
    assert "temperature" not in server.bodies[-1]
    with pytest.raises(ValueError, match="temperature from 0 to 2"):
        Sampling(temperature=3.0)


def test_rows_that_are_no_json_lines(
    server: DescriberServer, tmp_path: Path, patches: Path
) -> None:
    backend = OpenAIBackend(server.url, "m")
    array = tmp_path / "array.json"
    array.write_text('[{"id": "a", "image": "0.png"}]')
    with pytest.raises(ValueError, match="expected JSON lines, one object per line, found an arr"):
        run_step(describe(), backend, array, tmp_path / "o.jsonl", images=patches, progress=False)
    bad = tmp_path / "nan.jsonl"
    bad.write_text('{"id": "a", "image": "0.png", "caption": NaN}\n')
    out = tmp_path / "out.jsonl"
    report = run_step(describe(), backend, bad, out, images=patches, progress=False)
    assert "NaN is not JSON" in read_rows(report.skipped)[0]["reason"]
    assert not server.requests


def test_a_cache_of_an_earlier_version_opens(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c.sqlite") as old:
        old.execute(
            "CREATE TABLE replies (digest TEXT PRIMARY KEY, reply TEXT, problem TEXT, endpoint TEXT"
            " NOT NULL, cost REAL NOT NULL, tokens INTEGER NOT NULL)"
        )
        old.execute("INSERT INTO replies VALUES ('a', 'text', NULL, 'e', 0.5, 7)")
    old.close()
    cache = ReplyCache(tmp_path / "c.sqlite")
    kept = cache.get("a")
    assert kept is not None and kept.text == "text" and cache.verdict("a") is None
    assert cache.spent() == Spent(0.5, 7)


def test_bad_rows_are_left_out(server: DescriberServer, tmp_path: Path, patches: Path) -> None:
    (patches / "cut.png").write_bytes((patches / "1.png").read_bytes()[:60])
    (patches / "text.png").write_text("no image")
    bad: list[Any] = [
        "{no json", "[1]", '{"id": 3}', '{"id": "s", "caption": "\\ud800"}',
        {"id": "a"}, {"id": "b", "image": "../images/0.png"}, {"id": "c", "image": "/etc/hostname"},
        {"id": "d", "image": "absent.png"}, {"id": "e", "image": "cut.png"},
        {"id": "f", "image": "text.png"}, {"id": "g", "image": "0.png", "provenance": "me"},
        {"id": "h", "image": "0\0.png"}, {"id": "i", "image": "."},
        {"id": "j", "image": "0.png", "versions": ["me"]},
        {"id": "k", "image": "0.png", "versions": 3},
    ]  # fmt: skip
    source = write_rows(tmp_path / "rows.jsonl", [*bad, {"id": "good", "image": "0.png"}])
    out = tmp_path / "out.jsonl"
    backend = OpenAIBackend(server.url, "m")
    report = run_step(describe(), backend, source, out, images=patches, progress=False)
    assert [row["id"] for row in read_rows(out)] == ["good"]
    assert report.counts["failed"] == len(bad)
    left = {row["line"]: row["reason"] for row in read_rows(report.skipped)}
    assert sorted(left) == list(range(1, len(bad) + 1))
    assert all(left.values())
    assert "outside the image folder" in left[6] and "outside" in left[7]
    assert sum(server.requests.values()) == 1


def test_patches_are_found_by_their_ids(
    server: DescriberServer, tmp_path: Path, patches: Path
) -> None:
    Image.new("RGB", (8, 8)).save(patches / "slide_10_20.webp")
    rows = [{"id": "slide_10_20"}, {"id": "slide_1_2"}, {"id": "../images/0"}]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    backend = OpenAIBackend(server.url, "m")
    report = run_step(describe(), backend, source, out, images=patches, progress=False)
    assert [row["image"] for row in read_rows(out)] == ["slide_10_20.webp"]
    left = [row["reason"] for row in read_rows(report.skipped)]
    assert "slide_1_2: no such image file" in left[0] and "is not allowed in a file name" in left[1]


REVISED = {"usable": True, "problems": ["no necrosis"], "caption": WORDS}


@pytest.mark.usefixtures("patches")
def test_revise_corrects_and_rejects(server: DescriberServer, tmp_path: Path) -> None:
    def write(text: str) -> str:
        usable = "smudge" not in text
        return f"Here it is:\n{json.dumps(REVISED | {'usable': usable})}\nDone."

    server.write = write
    report, rows = ask(server, tmp_path, "case 1", "a smudge", step=revise())
    assert report.complete, "a rejection is a result"
    assert report.counts["rejected"] == 1
    assert (rows[0]["caption"], rows[0]["problems"]) == (WORDS, ["no necrosis"])
    assert read_rows(report.skipped)[0]["reason"] == "no necrosis"


@pytest.mark.usefixtures("patches")
def test_problems_in_another_form_are_kept(server: DescriberServer, tmp_path: Path) -> None:
    """The reply to a prompt of the user's need not list them."""
    prompt = tmp_path / "revise.json"
    prompt.write_text(json.dumps({"user": "Check: {caption:json}", "reply": {"type": "object"}}))
    server.write = lambda _: json.dumps(REVISED | {"problems": 2})
    _, rows = ask(server, tmp_path, "case 1", step=revise(prompt))
    assert rows[0]["problems"] == ["2"]


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize(
    "reply", [WORDS, "{}", '{"usable": "yes", "problems": [], "caption": "x"}', '{"usable": tru']
)
def test_replies_against_the_schema_are_not_taken(
    server: DescriberServer, tmp_path: Path, reply: str
) -> None:
    server.write = lambda _: reply
    report, rows = ask(server, tmp_path, "case 1", step=revise(), structured=True)
    assert not rows
    assert report.counts["failed"] == 1
    assert server.bodies[0]["response_format"]["json_schema"]["schema"]["type"] == "object"


@pytest.mark.usefixtures("patches")
def test_summarise_counts_clips_tokens(server: DescriberServer, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    long_words = " ".join(f"immunohistochemistry{n} hyperchromatic{n} zone" for n in range(15))
    server.write = lambda text: long_words if "case 1" in text else "Necrosis in fibrous stroma."
    report, rows = ask(server, tmp_path, "case 1", "case 2", step=summarise())
    assert [row["caption"] for row in rows] == ["Necrosis in fibrous stroma."]
    assert "tokens are too many" in read_rows(report.skipped)[0]["reason"]
    assert all(len(user_text(body)) for body in server.bodies)
    assert all(isinstance(body["messages"][1]["content"], str) for body in server.bodies)


@pytest.mark.usefixtures("patches")
def test_steps_follow_each_other(server: DescriberServer, tmp_path: Path) -> None:
    ask(server, tmp_path, "case 4")
    server.write = lambda _: json.dumps(REVISED)
    backend = OpenAIBackend(server.url, "other")
    run_step(
        revise(), backend, tmp_path / "out.jsonl", tmp_path / "revised.jsonl",
        images=tmp_path / "images", progress=False,
    )  # fmt: skip
    (row,) = read_rows(tmp_path / "revised.jsonl")
    assert [entry["step"] for entry in row["provenance"]] == ["describe", "revise"]
    assert list(row["versions"]) == ["source", "describe", "revise"]


@pytest.mark.usefixtures("patches")
def test_a_prompt_of_the_users_with_the_published_field(
    server: DescriberServer, tmp_path: Path
) -> None:
    prompt = tmp_path / "mine.txt"
    prompt.write_text("Say what you see.\n\nNotes: {description}\n\nReport: {report}\n")
    report, _ = ask(server, tmp_path, "case 9 {caption}", step=describe(prompt))
    assert report.complete
    assert list(server.requests) == ["Say what you see.\n\nNotes: case 9 {caption}"]


@pytest.mark.usefixtures("patches")
def test_a_killed_run_is_continued(server: DescriberServer, tmp_path: Path) -> None:
    rows = patch_rows(*[f"case {n}" for n in range(60)])
    source, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out.jsonl"
    server.write = lambda text: time.sleep(0.1) or f"{WORDS} {text[-9:]}"  # type: ignore[func-returns-value]
    arguments = [server.url, source, out, tmp_path / "images"]
    process = subprocess.Popen(
        [sys.executable, "-m", agents_killed.__name__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while sum(server.requests.values()) < 10:
        assert process.poll() is None
        time.sleep(0.005)
    with pytest.raises(ValueError, match="another run is writing"):
        ask(server, tmp_path, *[row["caption"] for row in rows])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    report, found = ask(server, tmp_path, *[row["caption"] for row in rows])
    assert report.counts["from cache"] >= 8
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert sum(server.requests.values()) <= 61, "at most the request in flight is asked again"
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.usefixtures("patches")
def test_killed_at_fifty_random_moments(server: DescriberServer, tmp_path: Path) -> None:
    number, kills = 60, 50
    source = write_rows(tmp_path / "pairs.jsonl", patch_rows(*[f"case {n}" for n in range(number)]))
    server.write = lambda text: time.sleep(0.02) or f"{WORDS} {text[-9:]}"  # type: ignore[func-returns-value]
    arguments = [server.url, source, tmp_path / "out.jsonl", tmp_path / "images", kills]
    result = subprocess.run(
        [sys.executable, "-m", agents_killed.__name__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    words = result.stdout.split()
    assert words[:2] == ["KILLED", str(kills)]
    # Each time to the end asks about every row once; a kill costs the requests in flight.
    most = int(words[3]) * number + 4 * kills
    assert int(words[3]) * number <= sum(server.requests.values()) <= most


def test_settings_that_make_no_sense_are_refused(
    server: DescriberServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="requires price_in"):
        Budget(max_cost=1)
    with pytest.raises(ValueError, match="a URL such as"):
        OpenAIBackend("localhost:80", "m")
    assert OpenAIBackend("http://me:pass@host/v1?key=1", "m").endpoint == "http://host/v1"
    source = write_rows(tmp_path / "rows.jsonl", [])
    with pytest.raises(ValueError, match="would replace"):
        run_step(describe(), OpenAIBackend(server.url, "m"), source, source)
    (tmp_path / "x.sqlite").write_text("something else, long enough to be no database at all")
    with pytest.raises(ValueError, match="not a cache of replies"):
        run_step(
            describe(), OpenAIBackend(server.url, "m"), source, tmp_path / "out.jsonl",
            cache=tmp_path / "x.sqlite", progress=False,
        )  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        OpenAIBackend(server.url, "m")


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_field_for_the_most_tokens(
    server: DescriberServer, tmp_path: Path, name: Any, patches: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", patch_rows("case 1"))
    backend = OpenAIBackend(server.url, "m", Sampling(77), token_field=name)
    run_step(describe(), backend, source, tmp_path / "out.jsonl", images=patches, progress=False)
    (body,) = server.bodies
    assert {key: body[key] for key in body if "tokens" in key} == {name: 77}


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "cache.sqlite")
    cache._connection.execute("PRAGMA max_page_count = 4")
    with pytest.raises(OSError, match=r"cache.sqlite: database or disk is full"):
        for number in range(100):
            cache.keep(str(number), "x" * 1000, None, "e", Spent())
    cache.close()


@pytest.mark.usefixtures("patches")
def test_the_cache_holds_no_image(server: DescriberServer, tmp_path: Path) -> None:
    ask(server, tmp_path, "case 1")
    with sqlite3.connect(tmp_path / "out.cache.sqlite") as cache:
        ((reply,),) = cache.execute("SELECT reply FROM replies").fetchall()
    assert reply.endswith("Field 1.")
