"""Contrastive loss between images: which of two answers belongs to which of two images.

Let two samples of a batch be asked the same question, with the right answers a and b. With
own = p(a | image 1) p(b | image 2) and exchanged = p(b | image 1) p(a | image 2), the loss is

    -log own / (own + exchanged),

the negative logarithm of the probability that the answers belong to their own images rather than
to the exchanged ones, given that one of them is a and one is b. It is the likelihood of matched
case-control studies (Breslow and Day 1980, IARC Scientific Publications 32, chapter 7), in which
everything that the pair shares cancels, including how frequent each answer to this wording is. The
mean cross-entropy, to which this loss is added, learns that frequency.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pallava.text.contrasts import ANSWER_BITS

CONTRAST_WEIGHT = 0.5
"""Weight relative to the mean cross-entropy, chosen by `benchmarks/text_prior.py`."""


def contrast_loss(logits: Tensor, targets: Tensor, marks: Tensor) -> Tensor:
    """Computes the weighted mean over all pairs of different answers to one wording in the batch.

    Answers are compared by their first token; pairs with the same first token are skipped.

    Args:
        logits: `(N, vocabulary)` at the positions that predict a label of some sample.
        targets: `(N,)` labels.
        marks: `(N,)` marks of the answers that start there, or 0; see `pallava.text.contrasts`.

    Returns:
        A scalar; zero if there is no pair.
    """
    starts = marks.nonzero().squeeze(1)
    targets, marks = targets[starts], marks[starts]
    scores = logits[starts][:, targets]  # (n, n): the logit of each answer at each question
    gains = scores.diagonal()[:, None] - scores
    wordings = marks >> ANSWER_BITS
    pairs = (wordings[:, None] == wordings) & (marks[:, None] != marks)
    pairs = (pairs & (targets[:, None] != targets)).triu()
    losses = F.softplus(-(gains + gains.T)[pairs])
    return CONTRAST_WEIGHT * losses.sum() / max(1, len(losses))
