"""Lloyd's iteration against scikit-learn's KMeans, from the same centres."""

import numpy as np
import pytest
import torch

from labkit.quant import lloyd

cluster = pytest.importorskip("sklearn.cluster")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_centres_and_labels_are_equal(k: int, weighted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, size=800)
    w = rng.random(800) ** 2 if weighted else None
    start = np.quantile(x, (np.arange(k) + 0.5) / k)  # so no cluster empties
    theirs = cluster.KMeans(k, init=start[:, None], n_init=1, max_iter=1000, tol=0, algorithm="lloyd")
    labels = theirs.fit_predict(x[:, None], sample_weight=w)
    assert len(set(labels)) == k
    ours = lloyd(
        torch.from_numpy(x)[None],
        torch.from_numpy(start)[None],
        None if w is None else torch.from_numpy(w)[None],
    )[0].numpy()
    np.testing.assert_allclose(ours, theirs.cluster_centers_[:, 0], rtol=1e-9, atol=1e-12)
    assert np.array_equal(np.abs(x[:, None] - ours).argmin(axis=1), labels)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_every_step_is_equal(iterations: int) -> None:
    rng = np.random.default_rng(7)
    x, start = rng.normal(size=500), np.linspace(-1, 1, 8)
    theirs = cluster.KMeans(8, init=start[:, None], n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    theirs.fit(x[:, None])
    ours = lloyd(torch.from_numpy(x)[None], torch.from_numpy(start)[None], iterations=iterations)
    np.testing.assert_allclose(ours[0].numpy(), theirs.cluster_centers_[:, 0], rtol=1e-9, atol=1e-12)
