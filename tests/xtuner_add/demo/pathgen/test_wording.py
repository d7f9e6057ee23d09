from __future__ import annotations

import itertools
import json

import jsonschema
import numpy as np
import pytest

from pathgen.agents.captions import CLIP_TOKENS, check_caption, clip_token_counter
from pathgen.agents.prompts import load_prompt
from xtuner_add.demo.pathgen import wording
from xtuner_add.demo.pathgen.describer import TASKS, prompt_file
from xtuner_add.demo.pathgen.painting import TISSUES
from xtuner_add.demo.pathgen.wording import Field

CLEAN = [
    Field(tissues, look)
    for count in (1, 2)
    for tissues in itertools.combinations(TISSUES, count)
    for look in (True, False, None)
]
SPOILT = [Field(("fat",), None, fault) for fault in ("out of focus", "ink")]


@pytest.mark.parametrize("seed", range(4))
def test_paragraphs_pass_the_agents_checks_and_say_what_is_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for field in [*CLEAN, *SPOILT]:
        text = wording.paragraph(field, rng)
        check_caption(text, min_words=20, max_words=250)
        if field.fault is None:
            assert wording.says(text, field), text
            assert wording.named_look(text) == field.vesicular, text
        else:
            assert not wording.says(text, field)


def test_summaries_fit_clip_and_say_what_is_there() -> None:
    count = clip_token_counter()
    for field, form in itertools.product(CLEAN, range(wording.NUM_SUMMARIES)):
        text = wording.summary(field, form)
        assert count(text) <= 32 < CLIP_TOKENS
        check_caption(text, min_words=3, max_words=60)
        assert (wording.named_tissues(text), wording.named_look(text)) == (
            field.tissues,
            field.vesicular,
        )


def test_revisions_fit_the_schema_and_correct_what_is_wrong() -> None:
    rng = np.random.default_rng(0)
    schema = load_prompt("revise").schema
    corrected = 0
    for field in [*CLEAN, *SPOILT] * 3:
        draft, reply = wording.revision(field, rng)
        value = json.loads(reply)
        jsonschema.validate(value, schema)
        assert value["usable"] is (field.fault is None)
        if field.fault is not None:
            continue
        right = wording.says(draft, field) and wording.named_look(draft) == field.vesicular
        assert bool(value["problems"]) is not right, (draft, value)
        assert wording.says(value["caption"], field)
        corrected += not right
    assert 0.15 < corrected / (3 * len(CLEAN)) < 0.45


def test_prompts_take_the_caption_along() -> None:
    row = {"caption": 'a "quoted" word'}
    for task in TASKS:
        asked = load_prompt(prompt_file(task)).fill(row)
        assert ('"a \\"quoted\\" word"' in asked) is (task != "describe")
