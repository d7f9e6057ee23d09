"""Filters captions in named steps; counts what each step drops and keeps samples of it.

Each step sees what the steps before it kept. The first of several duplicates is kept. Per kept
caption, exact deduplication takes about 0.2 kB of memory, near deduplication about 2 kB.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pathcore.chat_replies import find_markup
from pathcore.files import StrPath, write_json
from pathcore.rows import encode_row, read_rows_with_id, row_files, source_and_target

_REFUSAL = re.compile(
    r"\b(?:i['\u2019]?m|i am|we are|we['\u2019]?re) (?:very |so |really |truly )?"
    r"(?:sorry|afraid|unable|not (?:able|qualified|allowed|permitted|comfortable))\b"
    r"|\b(?:i|we) (?:can ?not|can['\u2019]?t|do(?: not|n['\u2019]?t) (?:have the|have access))\b"
    r"|\b(?:i|we) (?:won['\u2019]?t|will not|must decline|have to decline|decline to)\b"
    r"|\b(?:i|we) (?:apologi[sz]e|regret)\b|\bmy apologies\b|\A\W*(?:sorry|unfortunately)\b"
    r"|\bunable to (?:view|see|open|access|process|assist|help|comply|fulfil|provide)\w*\b"
    r"|\b(?:content|usage|safety) (?:policy|policies|guidelines)\b"
    # Chatter around a caption, addressed to the user.
    r"|\blet me know if\b|\bi hope this\b|\bfeel free to\b|\bif you (?:have|need) any\b"
    r"|\bas an? (?:\w+ ){0,2}(?:ai|language model|assistant)\b"
    r"|\b(?:no|without an?) image (?:was|is|has been) (?:provided|attached|given)\b"
    r"|\b(?:please|could you) (?:provide|upload|share|attach|supply)\b"
    r"|\bconsult (?:a|your) (?:\w+ ){0,3}(?:professional|doctor|physician)\b"
    # The describer saw something other than tissue.
    r"|\bimage (?:provided )?(?:is not|isn['\u2019]t) (?:of|an?|from|related)\b"
    r"|\bdo(?:es)? not (?:pertain|relate|correspond) to\b"
    r"|\bdoes not contain any (?:cells?|tissues?|patholog|histolog)",
    re.IGNORECASE,
)
_SOURCE = (
    r"(?:additional|given|provided|supplied|accompanying|above|original|prior|supplementary|draft)"
)
_TEXT = r"(?:descriptions?|information|notes?|captions?|texts?|reports?|prompts?)"
_LEAK = re.compile(
    rf"\b{_SOURCE} (?:\w+ )?{_TEXT}\b"
    r"|\b(?:according to|based on|as (?:stated|described|mentioned|noted) in|in line with"
    rf"|considering) (?:the|this|your) (?:\w+ )?{_TEXT}\b"
    r"|\b(?:this|the|your) (?:\w+ )?(?:description|caption)\b"
    r"|\bthe (?:notes?|report|prompt) "
    r"(?:\w+ )?(?:mentions?|states?|says?|suggests?|indicates?|describes?|provided)\b"
    rf"|\b{_TEXT} (?:you )?provided\b|\bprovided clinical\b|\bas mentioned earlier\b"
    r"|\byou(?:r| have)? (?:provided|gave|given|notes?)\b"
    # No image shows these; they can only come from a text that the writer was given.
    r"|\b(?:given|considering|with) (?:the |a )?clinical (?:context|history|information|symptoms)\b"
    r"|\bclinical (?:context|history|symptoms) of\b|\bpatient['\u2019]s (?:history|age)\b",
    re.IGNORECASE,
)
# A generation that got stuck repeats a unit of up to this many words.
_LOOP_WORDS = 16
_CHARACTER_RUN = re.compile(r"([^\W_]|[!?])\1{7,}")
_MIN_WORDS_FOR_VARIETY = 40
_MIN_VARIETY = 0.4
"""Distinct words among all words. The lowest of 5,000 captions of PathGen-1.6M is 0.68."""
# A sign at the end is part of a word: ER+ and ER- are opposite findings.
_WORD = re.compile(r"\w+(?:[-'\u2019/]\w+)*(?:\++|[-\u2212](?![-\w]))?")
_SHINGLE_WORDS = 3


@dataclass(frozen=True)
class FilterStep:
    """One reason to drop captions.

    Attributes:
        name: Name in reports and on the command line.
        fault: Function from a row to the reason why it is dropped, or None.
        within: Field by which the step groups rows, if any.
    """

    name: str
    fault: Callable[[Mapping[str, Any]], str | None]
    within: str | None = None


@dataclass
class StepCount:
    """Number of captions that a step saw and dropped, with samples of the dropped ones."""

    name: str
    seen: int = 0
    dropped: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


def find_refusal(text: str) -> str | None:
    """Returns the words by which a model declines to describe, or None.

    Example:
        >>> find_refusal("I'm sorry, but I can't help with that.")
        "I'm sorry"
        >>> find_refusal("Sheets of plasma cells.") is None
        True
    """
    found = _REFUSAL.search(text)
    return found[0] if found else None


def find_leak(text: str) -> str | None:
    """Returns the words which reveal that the caption's writer was given a text, or None.

    Example:
        >>> find_leak("Based on the given description, this is a carcinoma.")
        'Based on the given description'
        >>> find_leak("The nuclei are described as vesicular.") is None
        True
    """
    found = _LEAK.search(text)
    return found[0] if found else None


def find_loop(text: str) -> str | None:
    """Returns what a text repeats in a loop, as stuck generations do, or None.

    A loop is one word four times in a row, two to sixteen words three times in a row, one character
    eight times in a row, or a long text with very few different words.

    Example:
        >>> find_loop("Pink stroma stroma stroma stroma"), find_loop("A very, very large cell.")
        ('stroma', None)
    """
    if run := _CHARACTER_RUN.search(text):
        return run[0][:40]
    words = _words(text)
    for size in range(1, min(_LOOP_WORDS, len(words) // 3) + 1):
        # In a loop of units of `size` words each word equals the one `size` before it.
        most, equal = (4 if size == 1 else 3), 0
        for index in range(size, len(words)):
            equal = equal + 1 if words[index] == words[index - size] else 0
            if equal >= (most - 1) * size:
                return " ".join(words[index - size + 1 : index + 1])
    if len(words) >= _MIN_WORDS_FOR_VARIETY and len(set(words)) < _MIN_VARIETY * len(words):
        return " ".join(words[:8])
    return None


def count_words(text: str) -> int:
    """Returns the number of words; `high-grade` and `N/C` count as one each."""
    return len(_WORD.findall(text))


def length_step(min_words: int, max_words: int) -> FilterStep:
    """Drops captions with fewer than `min_words` or more than `max_words` words.

    Raises:
        ValueError: If no length satisfies both bounds.
    """
    if not 1 <= min_words <= max_words:
        raise ValueError(f"words: expected 1 <= minimum <= maximum, found {min_words}..{max_words}")

    def fault(row: Mapping[str, Any]) -> str | None:
        count = count_words(row["caption"])
        if min_words <= count <= max_words:
            return None
        return f"{count} words; expected {min_words} to {max_words}"

    return FilterStep("length", fault)


def refusal_step() -> FilterStep:
    """Drops replies that decline to describe."""
    return FilterStep("refusal", lambda row: _found(find_refusal(row["caption"])))


def leak_step() -> FilterStep:
    """Drops captions that mention the text their writer was given."""
    return FilterStep("leak", lambda row: _found(find_leak(row["caption"])))


def markup_step() -> FilterStep:
    """Drops captions with reasoning tags or tokens of a chat template."""
    return FilterStep("markup", lambda row: _found(find_markup(row["caption"])))


def loop_step() -> FilterStep:
    """Drops captions that repeat the same words over and over."""
    return FilterStep("loop", lambda row: _found(find_loop(row["caption"])))


def exact_step(within: str | None = None) -> FilterStep:
    """Drops captions that equal an earlier one, ignoring case, punctuation and white space.

    Args:
        within: Compare only rows with the same value of this field, `wsi_id` for instance.
    """
    first: dict[bytes, str] = {}

    def fault(row: Mapping[str, Any]) -> str | None:
        words = f"{_group(row, within)}\0{' '.join(_words(row['caption']))}"
        digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
        if digest in first:
            return f"as in {first[digest]}"
        first[digest] = row["id"]
        return None

    return FilterStep("exact", fault, within)


def near_step(
    within: str | None = None, *, threshold: float = 0.8, num_perm: int = 128
) -> FilterStep:
    """Drops captions that share most of their three-word sequences with an earlier one.

    Candidates are found by MinHash and locality-sensitive hashing (datasketch) and dropped by their
    estimated Jaccard similarity.

    Args:
        within: See `exact_step`.
        threshold: Minimum similarity of duplicates.
        num_perm: Hash functions; the estimate's error is about `1 / sqrt(num_perm)`.

    Raises:
        ValueError: If the threshold is not between 0 and 1.
    """
    from datasketch import MinHash, MinHashLSH

    if not 0 < threshold < 1:
        raise ValueError(
            f"near duplicates: expected a similarity between 0 and 1, found {threshold}"
        )
    # datasketch chooses the bands; its own tables take 30 kB per caption.
    chosen = MinHashLSH(threshold=threshold, num_perm=num_perm)
    bands = [_Band() for _ in range(chosen.b)]
    sketch = MinHash(num_perm=num_perm)
    ids: list[str] = []
    sketches: list[NDArray[np.uint32]] = []

    def fault(row: Mapping[str, Any]) -> str | None:
        sketch.clear()
        sketch.update_batch(_shingles(row["caption"], _group(row, within)))
        values = sketch.hashvalues.astype(np.uint32)
        keys = [hash(values[n * chosen.r : (n + 1) * chosen.r].tobytes()) for n in range(chosen.b)]
        candidates = {
            index for band, key in zip(bands, keys, strict=True) for index in band.like(key)
        }
        best = max(
            ((float(np.mean(values == sketches[index])), -index) for index in candidates),
            default=(0.0, 0),
        )
        if best[0] >= threshold:
            return f"{best[0]:.2f} like {ids[-best[1]]}"
        for band, key in zip(bands, keys, strict=True):
            band.add(key)
        ids.append(row["id"])
        sketches.append(values)
        return None

    return FilterStep("near", fault, within)


class _Band:
    """Finds earlier sketches by the hash of their values in one band.

    The sketches of one key form a chain: `_last` holds the newest, `_before` the one before each.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._before = array("q")

    def like(self, key: int) -> Iterator[int]:
        index = self._last.get(key, -1)
        while index >= 0:
            yield index
            index = self._before[index]

    def add(self, key: int) -> None:
        self._before.append(self._last.get(key, -1))
        self._last[key] = len(self._before) - 1


def filter_captions(
    source: StrPath,
    out: StrPath,
    steps: Sequence[FilterStep],
    *,
    num_samples: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> list[StepCount]:
    """Copies rows whose captions pass every step.

    Also writes `<stem>.dropped.jsonl` (id, step and reason of every dropped row) and
    `<stem>.filters.json` (counts and samples) beside `out`.

    Args:
        source: Rows with `id` and `caption`.
        out: Output file; rows that pass are copied unchanged and in order.
        steps: Steps, in the order in which they apply, after a built-in first step `readable`.
        num_samples: Number of dropped captions to keep per step, drawn uniformly.
        seed: Seed of that draw.
        progress: Whether to show a progress bar.

    Returns:
        One count per step.

    Raises:
        FileNotFoundError: If `source` does not exist.
        ValueError: If `out` is `source`, or another run is writing it, or no row can be read, or no
            row has the field within which duplicates are sought.
    """
    source, out = source_and_target(source, out)
    missing = {step.within for step in steps if step.within}
    counts = [StepCount("readable"), *(StepCount(step.name) for step in steps)]
    draw = random.Random(seed)
    with row_files(out, out.with_name(f"{out.stem}.dropped.jsonl")) as (kept_file, dropped_file):
        bar = tqdm(read_rows_with_id(source), desc="filtered", unit="row", disable=not progress)
        for line, row, index, reason in _sift(bar, steps):
            for count in counts[: len(counts) if reason is None else index + 1]:
                count.seen += 1
            missing -= row.keys()
            if reason is None:
                kept_file.write(encode_row(row))
                continue
            left = {"line": line, "id": row.get("id", ""), "step": counts[index].name}
            left["reason"] = reason
            dropped_file.write(encode_row(left))
            _sample(counts[index], {**left, "caption": row.get("caption")}, num_samples, draw)
        if counts[0].seen == counts[0].dropped:  # before the files appear
            why = f": {counts[0].samples[0]['reason']}" if counts[0].samples else ""
            raise ValueError(f"{source}: none of {counts[0].seen} rows can be used{why}")
        if missing:
            raise ValueError(
                f"{source}: no row has the field {', '.join(map(repr, missing))}, within which "
                "duplicates are sought"
            )
    kept = counts[-1].seen - counts[-1].dropped
    summary = {"rows": counts[0].seen, "kept": kept, "steps": [vars(count) for count in counts]}
    write_json(out.with_name(f"{out.stem}.filters.json"), summary)
    return counts


def _sift(
    rows: Iterator[tuple[int, dict[str, Any] | str]], steps: Sequence[FilterStep]
) -> Iterator[tuple[int, dict[str, Any], int, str | None]]:
    """Yields line, row, index of the step that dropped it (0: not readable), and the reason."""
    for line, row in rows:
        if isinstance(row, str):
            yield line, {}, 0, row
            continue
        caption = row.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            yield line, row, 0, f"caption: expected text, found {json.dumps(caption):.80}"
            continue
        for index, step in enumerate(steps, start=1):
            reason = step.fault(row)
            if reason is not None:
                yield line, row, index, reason
                break
        else:
            yield line, row, len(steps), None


def _sample(count: StepCount, row: dict[str, Any], most: int, draw: random.Random) -> None:
    """Keeps a uniform sample of the dropped rows (reservoir sampling)."""
    count.dropped += 1
    if len(count.samples) < most:
        count.samples.append(row)
    elif (place := draw.randrange(count.dropped)) < most:
        count.samples[place] = row


def _found(words: str | None) -> str | None:
    return None if words is None else f"says {words!r}"


def _group(row: Mapping[str, Any], within: str | None) -> str:
    return "" if within is None else json.dumps(row.get(within))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _shingles(text: str, group: str) -> list[bytes]:
    words = _words(text)
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return [f"{group}\0{' '.join(words[i : i + _SHINGLE_WORDS])}".encode() for i in range(count)]
