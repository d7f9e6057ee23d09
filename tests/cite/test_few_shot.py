from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cite.few_shot import FeatureAdapter, FeatureCache, LearnedContext, _word_embeddings
from cite.text_encoder import BertTextEncoder, NamedTextEncoder
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip

TINY_BERT = Path(__file__).parents[1] / "golden" / "cite" / "tiny_bert"
NAMES = ["fat", "blood"]


def test_adapter_by_hand() -> None:
    adapter = FeatureAdapter(4, reduction=2, ratio=0.25)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0]]))
        adapter.up.weight.copy_(torch.tensor([[1.0, 1], [0, 2], [0, 0], [-1, 0]]))
    # Hidden: ReLU(2) = 2 and ReLU(-3) = 0; output of the bottleneck: (2, 0, 0, -2).
    found = adapter(torch.tensor([[2.0, 3, 4, 8]]))
    assert found.tolist() == [[0.25 * 2 + 1.5, 2.25, 3.0, -0.5 + 6.0]]
    for values, message in (((4, 2, 1.5), "from 0 to 1"), ((4, 5), "1 to 4")):
        with pytest.raises(ValueError, match=message):
            FeatureAdapter(*values)


def test_cache_by_hand() -> None:
    cache = FeatureCache(2, 3, alpha=2.0, beta=1.5)
    with pytest.raises(RuntimeError, match="no training images"):
        cache(torch.ones(1, 2))
    optimizer = torch.optim.SGD(cache.parameters(), lr=1.0)
    cache.fill(torch.tensor([[3.0, 0], [0, 5], [4, 3]]), torch.tensor([0, 2, 2]))
    found = cache(torch.tensor([[10.0, 0]]))
    near = [np.exp(-1.5 * (1 - cosine)) for cosine in (1.0, 0.0, 0.8)]
    assert found[0].tolist() == pytest.approx([2 * near[0], 0.0, 2 * (near[1] + near[2])])
    before = cache.keys.detach().clone()
    found[0, 2].backward()
    optimizer.step()  # it was built while the cache was empty
    # d/dk of alpha exp(-beta (1 - f.k)) is alpha beta exp(...) f; keys of other classes stay.
    torch.testing.assert_close(cache.keys[0], before[0])
    moved = torch.tensor([[2 * 1.5 * value, 0.0] for value in near[1:]], dtype=torch.float32)
    torch.testing.assert_close(before[1:] - cache.keys[1:], moved)
    other = FeatureCache(2, 3)
    other.load_state_dict(cache.state_dict())
    torch.testing.assert_close(other.keys, cache.keys)
    assert other.labels.tolist() == [0, 2, 2]


@pytest.fixture(scope="module", params=["open_clip", "hugging_face", "bert"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("text") / "model"
    if request.param == "bert":
        return BertTextEncoder(str(TINY_BERT), pooling="mean")
    save = save_open_clip if request.param == "open_clip" else save_hugging_face
    return NamedTextEncoder(save(folder))


def test_context_takes_the_place_of_words(encoder: BertTextEncoder | NamedTextEncoder) -> None:
    plain = encoder.encode(NAMES)
    torch.manual_seed(0)
    learned = LearnedContext(encoder, NAMES, num_context=4)
    assert learned.texts == ["x x x x fat.", "x x x x blood."]
    assert list(learned.state_dict()) == ["context"]
    words = _word_embeddings(encoder, learned.texts, 4)
    seen = []
    handle = words.register_forward_hook(lambda module, ids, output: seen.append(ids[0]))
    expected = encoder.encode(learned.texts)
    handle.remove()
    with torch.no_grad():  # the context of the placeholder itself gives the text as it is
        learned.context.copy_(words.weight[seen[0][0, 1:5]])
        torch.testing.assert_close(learned(), expected)
        learned.context[1] = torch.randn(words.embedding_dim)
        assert (learned() - expected).abs().max() > 1e-4
    torch.testing.assert_close(encoder.encode(NAMES), plain)  # other uses are not changed
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


def test_context_is_learned(encoder: BertTextEncoder | NamedTextEncoder) -> None:
    torch.manual_seed(0)
    learned = LearnedContext(encoder, NAMES, num_context=2, std=0.5)
    target = F.normalize(torch.randn_like(learned()), dim=-1).detach()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = -F.cosine_similarity(learned(), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_a_context_longer_than_the_text_encoder(tmp_path: Path) -> None:
    encoder = NamedTextEncoder(save_open_clip(tmp_path / "clip"))
    with pytest.raises(ValueError, match="other than 90 equal tokens"):
        LearnedContext(encoder, NAMES, num_context=90)
