"""Which labels look wrong, from losses or predictions, where no row is trusted."""

import warnings

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor


def clean_by_loss(losses: Tensor) -> Tensor:
    """The probability that a label is clean, ``(N,)``, from the loss of each row: DivideMix's divider.

    Two Gaussians are fitted to the losses, scaled to [0, 1], with the constants of arXiv 2002.07394 [code]; rows are as
    clean as they belong to that of the smaller mean. Where all losses are equal, all are clean.

    Examples:
        >>> clean_by_loss(torch.tensor([0.1, 0.12, 0.2, 0.15, 2.9, 3.0, 3.2])).round()
        tensor([1., 1., 1., 1., 0., 0., 0.])
    """
    from sklearn.exceptions import ConvergenceWarning  # late, as most runs do without scikit-learn
    from sklearn.mixture import GaussianMixture

    span = losses.max() - losses.min()
    if not span > 0:
        return torch.ones_like(losses)
    x = ((losses - losses.min()) / span).double().cpu().numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten steps are what is published
        clean = mixture.fit(x).predict_proba(x)[:, mixture.means_.argmin()]
    return torch.from_numpy(clean).to(losses)


def confident_joint(labels: Tensor, probabilities: Tensor) -> Tensor:
    """How many rows have label i and are truly of class j, ``(C, C)``: confident learning (arXiv 1911.00068).

    A row may be of class j if its probability of j is at least the mean of that over rows with label j. Of such classes
    it counts as of the likeliest. Each row of the matrix is scaled to the number of rows with that label, and the
    diagonal has at least one count before, so that no row is empty [code].

    Args:
        labels: Given ones, ``(N,)``, in [0, C).
        probabilities: ``(N, C)``, of a model that was not trained on the row: else it has learned its wrong label.
    """
    classes = probabilities.shape[1]
    given = torch.bincount(labels, minlength=classes)
    own = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    threshold = probabilities.new_zeros(classes).index_add(0, labels, own) / given  # nan where no row has the label
    passes = probabilities >= threshold - 1e-6
    likeliest = probabilities.masked_fill(~passes, -1).argmax(1)
    pairs = (labels * classes + likeliest)[passes.any(1)]
    joint = torch.bincount(pairs, minlength=classes**2).view(classes, classes).to(probabilities)
    joint.diagonal().clamp_(min=1)
    return joint * (given / joint.sum(1)).unsqueeze(1)


def label_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Which labels are wrong, bool ``(N,)``: confident learning's "prune by noise rate", of `confident_joint`.

    For each pair of classes i and j, of the rows with label i, as many as the joint says are truly j: those whose
    probability of j exceeds that of i the most. A label that is the likeliest class is never wrong [code].
    """
    joint = confident_joint(labels, probabilities).round().long()
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    for i in range(len(joint)):
        rows = (labels == i).nonzero().squeeze(1)
        margins = probabilities[rows] - probabilities[rows, i].unsqueeze(1)
        for j in range(len(joint)):
            if j != i:
                wrong[rows[margins[:, j].argsort(descending=True, stable=True)[: joint[i, j]]]] = True
    return wrong & (probabilities.argmax(1) != labels)


def doubt(clean: Tensor, said: Tensor, labels: Tensor) -> Tensor:
    """The probability that each label is wrong, ``(N,)``: the mean of two estimates that err in different ways [ours].

    One is ``1 - clean``, which knows how often each class is mistaken for each other; where mistakes depend on the row,
    it is too sure of labels. The other is ``(1 + p - q) / 2``, with q the label's probability and p that of the
    likeliest other class: it takes no mistake for more common than another.

    Args:
        clean: The probability that the label is right by `lit_kd.trust.belief.believe`, ``(N,)``.
        said: The running mean of what the student said of each row, ``(N, C)``.
        labels: Given ones, ``(N,)``, in [0, C).

    Examples:
        >>> doubt(torch.tensor([0.8]), torch.tensor([[0.7, 0.1, 0.2]]), torch.tensor([0]))
        tensor([0.2250])
    """
    y = labels.unsqueeze(1)
    own, other = said.gather(1, y).squeeze(1), said.scatter(1, y, -1.0).amax(1)
    return (1 - clean + (1 + other - own) / 2) / 2
