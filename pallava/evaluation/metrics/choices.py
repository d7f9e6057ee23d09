"""Reads the chosen letter from a reply to a multiple-choice question.

docs/evaluation.md ("What counts as an answer") describes the grammar for users. In short, each
mention of an option's letter is classified as stated, ruled out, or merely mentioned. A single
stated letter is the answer; two different ones give no answer. The texts of the options are
consulted only if the reply states no letter.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pallava.evaluation.metrics.replies import answer_part, boxed, plain
from pallava.text.words import words

# A standalone letter; excludes "B-cell", "non-A", "I'd", "A's", "U.S.A.", "H&E".
_LETTER = re.compile(r"(?<![\w&])(?<!\w['.-])([A-Za-z])(?![\w&]|['-]\w)")
_INITIALS = re.compile(r"\b([A-H])\.(?=[A-H]\b(?!'))")  # "A.B.C.D." is four letters
_STAIN = re.compile(r"\bH\s?(?:&|and)\s?E\b")
_NAMED_BEFORE = re.compile(
    r"\b(?:type|grade|stage|group|class|hepatitis|vitamin|fig(?:ure)?\.?|panel|image|picture|photo|"
    r"slide|patient|case|sample|specimen|immunoglobulin|factor|protein|cyclin|level|zone|phase|"
    r"influenza|duke'?s|complement|haemophilia|hemophilia)\s+$",
    re.IGNORECASE,
)
_NAMED_AFTER = re.compile(
    r"\s+(?:cells?|lymphocytes?|lymphoblasts?)\b|\.\s?(?:coli|difficile|pylori|albicans|fumigatus|"
    r"neoformans|perfringens|trachomatis|histolytica|granulosus|cereus|burgdorferi|glabrata|auris|"
    r"immitis|botulinum|diphtheriae|dermatitidis)\b"
)
# Words after which a preceding "A" is the letter, not the article: "A is correct", "A because".
_NOT_AFTER_ARTICLE = (
    r"(?:is|isn't|are|was|were|shows?|describes?|represents?|would|could|can|cannot|can't|must|"
    r"should|may|might|does|doesn't|seems?|appears?|looks?|fits?|match(?:es)?|because|since|as|and|"
    r"or|but|nor|has|have|lacks?|fails?|refers?|corresponds?|indicates?|suggests?|rather|instead|"
    r"over|due|given|based|for|if|then|not|remains?|will|best|vs|versus|with|to|in)\b"
)
_ARTICLE = re.compile(rf"\s+(?!{_NOT_AFTER_ARTICLE})[a-z]")

_OPEN, _CLOSE = r"[(\[{\"'<]", r"[)\]}\"'>]"
_RIGHT, _FAULTY = "\u2713\u2714\u2705", "\u2717\u2718\u274c\u00d7"  # ticks and crosses
_SIGN = re.compile(rf"\s*(?:[:.)\]}}\u2013\u2014,{_RIGHT}{_FAULTY}]|-(?=\s))")
_PREFIX = re.compile(
    r"(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|letter|answer)\s*[:=]?\s*"
    rf"{_OPEN}*$",
    re.IGNORECASE,
)
_REASON_FOLLOWS = re.compile(
    r"\s*,?\s*(?:because|since|as|due|given|rather|instead|based|over)\b|\s*\("
)
_JOINT = re.compile(
    rf"{_CLOSE}*\s*(?:[,/&+]|,?\s*(?:and/or|and|or|nor|versus|vs\.?)(?=\W))?\s*"
    r"(?:(?:maybe|possibly|perhaps|probably|even|also)\s+)?"
    rf"(?:(?:options?|choices?|letters?)\s+)?{_OPEN}*",
    re.IGNORECASE,
)

# Words that may come between "is" and the letter.
_FILL = (
    r"(?:\s*\b(?:most|more|likely|probably|clearly|definitely|certainly|obviously|therefore|thus|"
    r"then|indeed|actually|simply|just|only|still|the|correct|right|best|answer|option|choice|"
    r"letter|being|been|be|as|surely|almost)\b)*"
)
_TO_LETTER = r"[\s:=>\u2192\u2013\u2014(\[{\"'<-]*$"
_ANSWER_NOUN = re.compile(
    r"\b(?:answers?|ans|response|solution|diagnosis|conclusion|choice|option|letter|selection|pick|"
    r"guess|prediction|verdict)\b[\"')]*"
    r"(?:(?:\s+[a-z][\w,-]*){0,6}?\s*(?:\b(?:is|are|was|were|be|remains)\b|'s\b)"
    r"|\s*(?:[:=>\u2192\u2013\u2014]|-+>?(?=\s)))"
    rf"{_FILL}{_TO_LETTER}"
    rf"|\b(?:answer|ans)\b[\"')]*{_TO_LETTER}",
    re.IGNORECASE,
)
_CHOOSING = re.compile(
    r"\b(?:choose|chose|select(?:ed)?|pick(?:ed)?|think|believe|guess|say|suppose|suspect|conclude|"
    r"propose|prefer|favou?rs?|go(?:ing)?\s+(?:with|for)|opt(?:ing)?\s+for|settle\s+(?:on|for)|"
    r"vote\s+for|lean(?:ing)?\s+(?:to|towards?))\b(?:\s+that)?(?:\s+(?:it|this))?(?:\s*(?:is|'s))?"
    rf"{_FILL}{_TO_LETTER}",
    re.IGNORECASE,
)
_COPULA = re.compile(rf"(?:\b(?:is|are|was|be|becomes?|remains)\b|'s\b){_FILL}{_TO_LETTER}", re.I)
_CONNECTIVE = re.compile(
    r"\b(?:so|thus|therefore|hence|then|but|clearly|definitely|probably|likely|certainly|obviously|"
    r"surely|leaving|leaves|namely|(?:in)?consistent\s+with|compatible\s+with|suggest(?:s|ive\s+of)?"
    r"|indicat(?:es?|ing|ive\s+of)|points?\s+(?:to|towards?)|corresponds?\s+to|match(?:es)?|"
    rf"supports?|favou?rs?|represents?|shows?)\b,?{_FILL}{_TO_LETTER}",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    rf"\b(?:(?:could|may|might|can)\s+be|possibly|perhaps|maybe)\b{_FILL}{_TO_LETTER}", re.I
)
_VERB_FOLLOWS = re.compile(
    rf"{_CLOSE}*\s+(?:is|are|was|were|shows?|describes?|would|could|can|has|have|looks?|seems?|"
    r"appears?|refers?|represents?|does|fits?)\b",
    re.IGNORECASE,
)

_NEGATION = re.compile(
    r"(?:\bnot|n't|\b(?:no|never|neither|nor|cannot|without|unlike|exclud\w*|eliminat\w*|"
    r"rul(?:e|es|ed|ing)\s+out|rather\s+than|instead\s+of|except|against|reject\w*|discard\w*|"
    r"dismiss\w*|doubt\w*|unlikely|inconsistent))\b(?:\s+[^\s]+){0,8}\s*$",
    re.IGNORECASE,
)
_NO_NEGATION = re.compile(
    r"\b(?:no|without(?:\s+a)?|beyond)\s+(?:doubt|question)\b|\bnot\s+(?:only|just)\b", re.I
)
_BREAK = re.compile(
    r"[,;()]|:(?!\s*$)|\b(?:but|so|because|therefore|since|although|though|while|whereas|however|"
    r"hence|thus|yet|leaving|instead(?!\s+of)|then)\b",
    re.IGNORECASE,
)
_WRONG = (
    r"(?:wrong|incorrect|false|unlikely|excluded|ruled\s+out|eliminated|absent|inconsistent|"
    r"implausible|impossible|inappropriate|out\b|less\s+likely|(?:the\s+)?least|not\b)"
)
_DENIED_AFTER = re.compile(
    r"\s*,?\s*(?:(?:which|that|also|therefore|clearly|obviously|both|all)\s+)*"
    r"(?:(?:is|are|was|were|seems?|appears?|looks?|can|could|would|should|does|do|did|has|have|must|"
    r"may|might|will)(?:\s*n't|\s+not)\b|cannot\b|can't\b|lacks?\b|fails?\b|"
    r"(?:is|are|was|were|seems?|appears?|looks?|(?:can|could|would|must|should|may)\s+be)\s+"
    rf"(?:\w+\s+){{0,2}}?{_WRONG})",
    re.IGNORECASE,
)
_WRONG_LATER = re.compile(
    r"\b(?:is|are|was|were|seems?)\s+(?:\w+\s+)?(?:wrong|incorrect|false|not\s+(?:correct|right|the"
    r"\s+answer)|ruled\s+out|excluded|eliminated)\b",
    re.IGNORECASE,
)
_STATED_AFTER = re.compile(
    r"(?:\s*\([^()]{0,80}\))?\s*,?\s*(?:(?:which|that)\s+)?(?:"
    r"(?:is|are|was|were|seems?|appears?|looks?|remains?|(?:must|should|would|will)\s+be|has\s+to\s+be)"
    r"\s+(?:(?:the|a|also|more|most|clearly|therefore|thus|then|only|single|definitely|probably|to|"
    r"be|indeed|much|far|both|all)\s+)*"
    r"(?:correct|right|best|true|answer|likely|appropriate|accurate|consistent|better|choice|"
    r"probable|suitable|favou?red|preferred)\b"
    r"|best\s+(?:fits?|match(?:es)?|describes?|explains?)\b"
    r"|(?:fits?|match(?:es)?|describes?|explains?)\s+(?:\w+\s+){0,3}?best\b"
    r"|is\s*[.!]*\s*$)",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r"[\s:.)\]}\u2013\u2014,(-]*(?:"
    rf"(?P<no>no|not\s+\w+|incorrect|wrong|false|absent|[{_FAULTY}])"
    rf"|(?P<yes>yes|correct|true|right|[{_RIGHT}]))\ufe0f?\s*(?:[.,;)\n]|$|because\b|(?<=[{_RIGHT}{_FAULTY}])\s?)",
    re.IGNORECASE,
)
_FINAL = re.compile(r"\bfinal\s+(?:answer|choice|decision|diagnosis|selection)\b", re.IGNORECASE)
_REVISION = re.compile(
    r"\b(?:wait|on second thoughts?|correction|let me reconsider|scratch that|i made a mistake)\b",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"^\s*(?:explanations?|reasons?|reasoning|rationale|analysis|justification|why|note)\b",
    re.IGNORECASE | re.MULTILINE,
)
_CONDITION = re.compile(r"\s*(?:if|were|had|unless|suppose)\b", re.IGNORECASE)
_CONSIDERED = re.compile(
    r"\b(?:consider|compare|examine|evaluate|look|regarding|about|between|whether|unsure|first|"
    r"start|unlike|both|either)",
    re.IGNORECASE,
)
_SEGMENT_END = re.compile(r"\n+|(?<=[.!?;])\s+")

_BEFORE = 160
"""Characters before a letter that are searched for "the answer to this question is"."""
_AFTER = 300
"""Characters after a letter that are searched for its option's text."""

State = Literal["mentioned", "stated", "possible", "denied"]


@dataclass
class _Mention:
    """An occurrence of an option's letter in the reply.

    Attributes:
        letter: Capital letter of the option.
        start: Position of the letter.
        segment: Span of the sentence or line that contains it.
        role: `alone` if the sentence or line contains only letters, `label` if it begins with this
            letter, otherwise `inside`.
        state: What the surrounding words say about the letter.
    """

    letter: str
    start: int
    segment: tuple[int, int]
    role: Literal["alone", "label", "inside"] = "inside"
    state: State = "mentioned"

    @property
    def end(self) -> int:
        return self.start + 1


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Finds the letter that a reply chooses.

    Args:
        answer: Reply of the model.
        options: Option text by capital letter; texts may be empty.

    Returns:
        The letter, or None if the reply chooses none or several.

    Example:
        >>> options = {"A": "necrosis", "B": "fibrosis"}
        >>> replies = ("The answer is B", " a: x", "fibrosis.", "A is wrong", "A or B")
        >>> [parse_choice(reply, options) for reply in replies]
        ['B', 'A', 'B', None, None]
    """
    text = answer_part(answer)
    found = {_parse(plain(content), options) for content in boxed(text)}
    if found:
        return found.pop() if len(found) == 1 else None
    text = plain(text)
    for marker in (_FINAL, _REVISION):
        *_, last = [None, *marker.finditer(text)]
        if last is not None:
            rest = text[last.start() if marker is _FINAL else last.end() :]
            if letter := _parse(rest.lstrip(" ,.:-" if marker is _REVISION else ""), options):
                return letter
    return _parse(text, options)


def _parse(text: str, options: Mapping[str, str]) -> str | None:
    text = _STAIN.sub("HE", _INITIALS.sub(r"\1. ", text))
    texts = {letter: words(option) for letter, option in options.items()}
    said = words(text)
    equal = [letter for letter, option in texts.items() if option and option == said]
    if equal:
        return equal[0] if len(equal) == 1 else None
    mentions = _mentions(text, options)
    _judge(text, mentions, options)
    denied = {m.letter for m in mentions if m.state == "denied"}
    stated = {m.letter for m in mentions if m.state == "stated"}
    open_ = [m for m in mentions if m.state != "denied"]
    alone = {m.letter for m in open_ if m.role == "alone"}
    explanation = _EXPLANATION.search(text)
    limit = explanation.start() if explanation and explanation.start() else len(text)
    labels = {m.letter for m in open_ if m.role == "label" and m.start < limit}
    if len(alone) > 1 and not stated:
        return None
    # Several labels are a repetition of the options ("A: necrosis B: fibrosis ... Answer: B").
    heads = alone if len(alone) == 1 else labels if len(labels) == 1 and not alone else set()
    if stated or heads:
        named = stated | heads
        return named.pop() if len(named) == 1 else None
    if len(labels) > 1:
        return None
    possible = {m.letter for m in open_ if m.state == "possible"}
    if possible:
        return possible.pop() if len(possible) == 1 else None
    named = _by_text(text, texts) - denied
    mentioned = {m.letter for m in open_}
    if len(mentioned) == 1 and named <= mentioned and not _CONSIDERED.search(text):
        (only,) = (m for m in open_[:1])
        bracketed = text[only.start - 1 : only.start] in tuple("([{")
        ends = re.search(r"[,:]\s*$", text[: only.start]) and not re.search(r"\w", text[only.end :])
        if bracketed or ends or len(text.split()) <= 4:
            return only.letter
    return named.pop() if len(named) == 1 else None


def _mentions(text: str, options: Mapping[str, str]) -> list[_Mention]:
    segments = _segments(text)
    starts = [start for start, _ in segments]
    found: list[_Mention] = []
    by_segment: dict[tuple[int, int], list[_Mention]] = defaultdict(list)
    for match in _LETTER.finditer(text):
        letter, start = match.group().upper(), match.start()
        if letter not in options:
            continue
        segment = segments[bisect_right(starts, start) - 1]
        if _is_letter(text, start, options[letter], match.group(), segment):
            found.append(_Mention(letter, start, segment))
            by_segment[segment].append(found[-1])
    for segment, inside in by_segment.items():
        rest = "".join(
            text[first:last]
            for first, last in zip(
                [segment[0], *(m.end for m in inside)],
                [*(m.start for m in inside), segment[1]],
                strict=True,
            )
        )
        rest = re.sub(r"\b(?:the|correct|best|options?|choices?|letters?|and|or|either|both)\b", "",
                      rest, flags=re.IGNORECASE)  # fmt: skip
        if not re.search(rf"[\w{_RIGHT}{_FAULTY}]", rest):
            for mention in inside:
                mention.role = "alone"
            continue
        _find_labels(text, inside, options)
    return found


def _segments(text: str) -> list[tuple[int, int]]:
    """Splits text into spans of lines and sentences; "B. fibrosis" stays in one span."""
    spans, start = [], 0
    for match in _SEGMENT_END.finditer(text):
        piece = text[start : match.start()]
        if "\n" not in match.group() and re.fullmatch(rf"\s*{_OPEN}*[A-Za-z]{_CLOSE}*\.", piece):
            continue
        spans.append((start, match.end()))
        start = match.end()
    return [*spans, (start, len(text) + 1)]


def _is_letter(text: str, start: int, option: str, written: str, segment: tuple[int, int]) -> bool:
    """Returns whether a single letter denotes an option, not an article or part of a name."""
    # Bounded context keeps parsing of long replies linear.
    before, after = text[max(segment[0], start - _BEFORE) : start], text[start + 1 :][:_AFTER]
    if _NAMED_AFTER.match(after) and not _starts_with(after, option):
        return False
    if _NAMED_BEFORE.search(before):
        return False
    if _starts_with(after, option):  # "A necrosis"
        return True
    if written.isupper():
        return written != "A" or not _ARTICLE.match(after)
    at_start = not text[segment[0] : start].strip(" \t([{\"'<")
    closed = re.match(r"\s*(?:[:.)\]}\"',;>]|$|\n|(?:because|since)\b)", after) is not None
    if not re.search(r"\w\w", re.sub(r"\b(?:and|or)\b", "", text[slice(*segment)])):
        return True  # only letters: "a, b"
    bracketed = before[-1:] in tuple("([{\"'") and after[:1] in tuple(")]}\"'")
    if bracketed or (at_start and closed):
        return True
    named = _ANSWER_NOUN.search(before[-_BEFORE:]) or _PREFIX.search(before)
    return bool(named) and (closed or written != "a")


def _starts_with(after: str, option: str) -> bool:
    """Returns whether the option's text follows its letter."""
    expected, after = words(option), after.lstrip(" :.)]},-")
    # `words` joins "cd3 - positive", but "necrosis - wrong" is an option followed by a verdict.
    readings = (words(after), words(after.replace(" - ", ", ")))
    return bool(expected) and any(said[: len(expected)] == expected for said in readings)


def _find_labels(text: str, inside: Sequence[_Mention], options: Mapping[str, str]) -> None:
    first = inside[0]
    before = text[first.segment[0] : first.start]
    prefix = _PREFIX.fullmatch(before.lstrip())
    if not prefix and before.strip(" \t([{\"'<"):
        return
    after = text[first.end : first.segment[1]]
    sign = _SIGN.match(after)
    if prefix and sign and sign.group().strip() == ",":
        sign = None  # "Option A, which shows ..."
    if after[:1] == "?":
        return
    if sign or _starts_with(after, options[first.letter]) or _REASON_FOLLOWS.match(after):
        first.role = "label"
    elif not re.search(r"\w", after):
        first.role = "alone"
    # "A: necrosis B: fibrosis" on one line: labels in the order of the options.
    order, last = sorted(options), first
    for mention in inside[1:]:
        follows = order.index(mention.letter) == order.index(last.letter) + 1
        sign = _SIGN.match(text[mention.end :])
        if first.role == "label" and follows and sign and sign.group().strip() != ",":
            mention.role, last = "label", mention


def _judge(  # noqa: C901 - one rule of the grammar after another
    text: str, mentions: Sequence[_Mention], options: Mapping[str, str]
) -> None:
    """Classifies every mention by the surrounding words."""
    starts = [mention.start for mention in mentions]
    for group in _groups(text, mentions):
        first, last = group[0], group[-1]
        separators = text[first.end : last.start]
        if _is_denied_before(text, first):
            for mention in group:
                mention.state = "denied"
            continue
        for mention in group:
            mention.state = _stated_before(text, mention)
        following = starts[bisect_right(starts, last.start) :][:1]
        after = text[last.end : min([last.segment[1], *following])]
        rest = _after_own_text(after, options[last.letter])
        verdict = _DENIED_AFTER.match(rest) or _verdict(rest, last, "no")
        if verdict and last.state == "stated" and re.match(r"\s*(?:,|which|that)", verdict.group()):
            verdict = None  # "The answer is B, which is not malignant"
        if verdict:
            joined = re.search(r"\b(?:and|or|nor)\b|&", separators) or re.match(
                r"\s*(?:are|were)\b", verdict.group()
            )
            for mention in group if joined else [last]:
                if mention.state == "mentioned" or mention is last:
                    mention.state = "denied"
        elif last.role == "label" and _WRONG_LATER.search(after):
            last.state = "denied"
        elif _STATED_AFTER.match(rest) or _verdict(rest, last, "yes"):
            for mention in group:
                mention.state = "stated"
        if any(mention.state == "stated" for mention in group):
            begun = False
            for mention in group:  # "The answer is A and C"
                begun = begun or mention.state == "stated"
                if begun and mention.state == "mentioned":
                    mention.state = "stated"
        segment = text[first.segment[0] : first.segment[1]]
        if any(mention.state == "possible" for mention in group):  # "A or maybe C"
            for mention in group:
                if mention.state == "mentioned":
                    mention.state = "possible"
        if re.match(rf"{_CLOSE}*\?\s*no\b", text[last.end :], re.IGNORECASE):
            last.state = "denied"
        elif _CONDITION.match(segment) or re.match(rf"{_CLOSE}*\?", text[last.end :]):
            for mention in group:
                if mention.state == "stated":
                    mention.state = "mentioned"
                if len(mentions) > len(group):
                    mention.role = "inside"


def _groups(text: str, mentions: Sequence[_Mention]) -> Iterable[list[_Mention]]:
    """Groups the letters of each enumeration: "A, B and C", "A/B", "A. B. C."."""
    group: list[_Mention] = []
    for mention in mentions:
        if group:
            between = text[group[-1].end : mention.start]
            listed = (
                _ANSWER_NOUN.search(text[max(0, group[0].start - _BEFORE) : group[0].start])
                and re.fullmatch(r"[)\]]*\.\s+[(\[]*", between)
                and re.match(r"[)\]]*\s*(?:[.,;]|$|\n)", text[mention.end :])
            )
            if "\n" in between or not (listed or _JOINT.fullmatch(between)):
                yield group
                group = []
        group.append(mention)
    if group:
        yield group


def _is_denied_before(text: str, mention: _Mention) -> bool:
    before = text[mention.segment[0] : mention.start].rstrip(" \t:([{\"'<")
    before = _NO_NEGATION.sub(lambda match: "," * len(match.group()), before)
    *_, start = [0, *(match.end() for match in _BREAK.finditer(before))]
    return _NEGATION.search(before[start:]) is not None


def _stated_before(text: str, mention: _Mention) -> State:
    before = text[max(0, mention.start - _BEFORE) : mention.start]
    if _ANSWER_NOUN.search(before):
        return "stated"
    if _HEDGE.search(before):
        return "possible"
    if _VERB_FOLLOWS.match(text[mention.end :]):
        return "mentioned"
    cues = (_CHOOSING, _COPULA, _CONNECTIVE)
    return "stated" if any(cue.search(before) for cue in cues) else "mentioned"


def _after_own_text(after: str, option: str) -> str:
    """Returns the text after a letter, its punctuation and its option's text."""
    rest = re.sub(rf"^{_CLOSE}+", "", after)
    expected = words(option)
    if expected and _starts_with(rest, option):
        pattern = r"\W+(?:(?:a|an|the)\W+)?".join(map(re.escape, expected))
        if match := re.match(rf"\W*{pattern}{_CLOSE}*,?", rest, re.IGNORECASE):
            return rest[match.end() :]
    return rest


def _verdict(rest: str, mention: _Mention, kind: str) -> re.Match[str] | None:
    match = _VERDICT.match(rest) if mention.role == "label" else None
    return match if match and match.group(kind) else None


_CLAUSE = re.compile(
    r"[.;:!?()\n]+|,|\b(?:but|however|although|though|while|whereas|because|yet)\b"
    r"|\band\b(?=\s+(?:show|demonstrat|reveal|contain|display|exhibit|is\b|are\b|ha[sv]e?\b|there))",
    re.IGNORECASE,
)
_DENYING = {
    "no", "not", "without", "absence", "lack", "lacks", "lacking", "negative", "neither", "nor",
    "never", "cannot", "isnt", "arent", "wasnt", "dont", "doesnt", "cant", "rather", "instead",
    "exclude", "excludes", "excluded", "excluding", "ruled", "rules", "rule", "unlikely", "unlike",
    "except", "free", "against", "non",
}  # fmt: skip
_LINKS = {
    "is", "are", "was", "were", "be", "been", "can", "could", "has", "have", "clearly", "seems",
}  # fmt: skip
_DENYING_AFTER = {
    "not", "absent", "excluded", "unlikely", "ruled", "wrong", "incorrect", "negative", "missing",
    "lacking", "false", "cannot",
}  # fmt: skip
_NEGATED_LINKS = {"isnt", "arent", "wasnt", "werent", "cannot", "cant", "doesnt", "absent"}
_REACH = 8  # maximum number of words between a negation and the term it negates


def _by_text(text: str, options: Mapping[str, Sequence[str]]) -> set[str]:
    """Returns the letters of options whose texts the reply states without negating them."""
    said: list[str] = []
    clauses: list[int] = []  # clause number of each word
    for number, clause in enumerate(_CLAUSE.split(_NO_NEGATION.sub(" ", text))):
        found = words(clause)
        said += found
        clauses += [number] * len(found)
    spans = [
        (start, start + len(option), letter)
        for letter, option in options.items()
        if option
        for start in range(len(said) - len(option) + 1)
        if said[start : start + len(option)] == list(option)
    ]
    # "Invasive carcinoma" also contains the option "carcinoma"; the longest match counts.
    spans.sort(key=lambda span: (span[0], -span[1]))
    named, denied_to = set(), -1
    longest = (0, 0)
    for start, end, letter in spans:
        if end <= longest[1] and (start, end) != longest:
            continue
        longest = (start, end)
        # "No necrosis, fibrosis or fat" negates the whole enumeration.
        listed = denied_to >= 0 and set(said[denied_to:start]) <= {"or", "and", "nor"}
        listed = listed and not _is_contrast(text, said, denied_to, start, clauses)
        if listed or _is_denied(said, clauses, start, end):
            denied_to = end
        else:
            named.add(letter)
            denied_to = -1
    return named


def _is_contrast(
    text: str, said: Sequence[str], last: int, start: int, clauses: Sequence[int]
) -> bool:
    """Returns whether two words are separated by more than a comma."""
    del said
    pieces = _CLAUSE.findall(text)
    between = pieces[clauses[last - 1] : clauses[start]]
    return any(piece.strip() != "," for piece in between)


def _is_denied(said: Sequence[str], clauses: Sequence[int], start: int, end: int) -> bool:
    first = start
    while first > max(0, start - _REACH) and clauses[first - 1] == clauses[start]:
        first -= 1
    if _DENYING & set(said[first:start]):
        return True
    position, linked = end, False
    while position < len(said) and clauses[position] == clauses[start]:
        word = said[position]
        if word in _NEGATED_LINKS or (linked and word in _DENYING_AFTER):
            return True
        if word not in _LINKS:
            return False
        position, linked = position + 1, True
    return False


def contains(sequence: list[str], part: list[str]) -> bool:
    """Returns whether one list of words occurs in another, in order and without gaps."""
    width = len(part)
    return any(
        sequence[start : start + width] == part for start in range(len(sequence) - width + 1)
    )
