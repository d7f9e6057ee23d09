import pytest
import torch
from torch.nn import functional as F

from pallava.plip.losses import contrastive_loss, hard_negatives, ramped_alpha


def _features(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_without_soft_targets_it_is_cross_entropy():
    torch.manual_seed(0)
    feats, candidates = _features(4, 8), _features(10, 8).T
    positive = torch.eye(4, 10).bool()
    loss, sim = contrastive_loss(feats, feats, candidates, positive, torch.tensor(0.1), alpha=0.0)
    expected = F.cross_entropy(feats @ candidates / 0.1, torch.arange(4))
    torch.testing.assert_close(loss, expected)
    assert sim.shape == (4, 10)


def test_soft_targets_are_mixed_by_alpha():
    torch.manual_seed(0)
    feats, feats_m, candidates = _features(4, 8), _features(4, 8), _features(10, 8).T
    positive = torch.eye(4, 10).bool()
    losses = [
        contrastive_loss(feats, feats_m, candidates, positive, torch.tensor(0.1), alpha)[0]
        for alpha in (0.0, 0.4, 1.0)
    ]
    torch.testing.assert_close(losses[1], 0.6 * losses[0] + 0.4 * losses[2])


def test_positives_share_the_target():
    feats, candidates = torch.eye(2), torch.eye(2)
    both = torch.ones(2, 2).bool()
    loss, _ = contrastive_loss(feats, feats, candidates, both, torch.tensor(0.5), alpha=0.0)
    log_probs = torch.tensor([2.0, 0.0]).log_softmax(0)
    torch.testing.assert_close(loss, -log_probs.mean())


def test_ignored_candidates_have_no_say():
    torch.manual_seed(0)
    feats, feats_m = _features(4, 8).requires_grad_(), _features(4, 8)
    candidates, positive = _features(6, 8).T, torch.eye(4, 6).bool()
    temperature = torch.tensor(0.001)
    expected, _ = contrastive_loss(feats, feats_m, candidates, positive, temperature, 0.4)
    more = torch.cat([candidates, _features(5, 8).T], dim=1)
    loss, _ = contrastive_loss(
        feats,
        feats_m,
        more,
        torch.eye(4, 11).bool(),
        temperature,
        0.4,
        ignored=torch.arange(11) >= 6,
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert feats.grad.isfinite().all()


def test_negatives_are_never_positives_and_follow_similarity():
    torch.manual_seed(0)
    sim = torch.tensor([[9.0, 3.0, 0.0, 0.0], [0.0, 9.0, 9.0, 3.0]]).repeat(2000, 1)
    positive = torch.tensor([[True, False, False, False], [False, True, True, False]])
    drawn, found = hard_negatives(sim, positive.repeat(2000, 1))
    assert found.all()
    first, second = drawn[::2], drawn[1::2]
    assert set(first.tolist()) == {1, 2, 3}
    assert set(second.tolist()) == {0, 3}
    assert (first == 1).float().mean() > 0.8
    assert (second == 3).float().mean() > 0.8


def test_a_row_without_negatives_says_so():
    _, found = hard_negatives(torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]))
    assert found.tolist() == [False, True]


@pytest.mark.parametrize(
    ("step", "ramp_steps", "expected"), [(0, 10, 0.0), (5, 10, 0.2), (30, 10, 0.4), (0, 0, 0.4)]
)
def test_alpha_rises_and_stays(step, ramp_steps, expected):
    assert ramped_alpha(0.4, step, ramp_steps) == pytest.approx(expected)
