"""Notebook 04: answers that are wrong in a known way, and honest variants."""

import numpy as np
import torch


def gives_entries(x, table):
    return table[(x[..., None] - table).abs().argmin(-1)]


def entry_below(x, table):
    return (torch.searchsorted(table, x, right=True) - 1).clamp(min=0)


def entry_above(x, table):
    return torch.searchsorted(table, x).clamp(max=len(table) - 1)


def with_its_sign(x, table):
    return (x[..., None] - table).argmin(-1)


def with_the_other_sign(x, table):
    return (table - x[..., None]).argmin(-1)


def the_furthest(x, table):
    return (x[..., None] - table).abs().argmax(-1)


def as_if_uniform(x, table):
    step = (table[-1] - table[0]) / (len(table) - 1)
    return torch.round((x - table[0]) / step).clamp(0, len(table) - 1)


def by_borders(x, table):
    return torch.searchsorted((table[1:] + table[:-1]) / 2, x)


def by_squares_in_numpy(x, table):
    return np.argmin((x.numpy()[..., None] - table.numpy()) ** 2, axis=-1)


def one_at_a_time(x, table):
    entries = table.tolist()
    codes = [min(range(len(entries)), key=lambda i: abs(v - entries[i])) for v in x.flatten().tolist()]
    return torch.tensor(codes).reshape(x.shape)


def _chosen(x, centres):
    return (x[:, None] - centres).abs().argmin(1)


def _moved(x, centres, rule, chosen=None, empty=None):
    chosen = _chosen(x, centres) if chosen is None else chosen
    return torch.stack(
        [
            rule(x[chosen == i]) if (chosen == i).any() else (centres[i] if empty is None else empty)
            for i in range(len(centres))
        ]
    )


def empty_is_nan(x, centres):
    chosen = _chosen(x, centres)
    return torch.stack([x[chosen == i].mean() for i in range(len(centres))])


def empty_is_zero(x, centres):
    return _moved(x, centres, torch.mean, empty=torch.zeros(()))


def medians(x, centres):
    return _moved(x, centres, lambda part: part.quantile(0.5))


def torch_medians(x, centres):
    return _moved(x, centres, torch.median)


def middles(x, centres):
    return _moved(x, centres, lambda part: (part.min() + part.max()) / 2)


def sums(x, centres):
    return _moved(x, centres, torch.sum)


def from_below(x, centres):
    return _moved(x, centres, torch.mean, (torch.searchsorted(centres, x, right=True) - 1).clamp(min=0))


def does_not_move(x, centres):
    return centres


def borders(x, centres):
    return (centres[1:] + centres[:-1]) / 2


def with_bincount(x, centres):
    chosen = _chosen(x, centres)
    count = torch.bincount(chosen, minlength=len(centres))
    total = torch.bincount(chosen, weights=x.double(), minlength=len(centres))
    return torch.where(count > 0, total / count.clamp(min=1), centres.double())


def in_place(x, centres):
    chosen = _chosen(x, centres)
    for i in chosen.unique():
        centres[i] = x[chosen == i].mean()
    return centres


def from_end_to_end(x, k):
    return torch.quantile(x, torch.linspace(0, 1, k))


def lower_ends(x, k):
    return torch.quantile(x, torch.arange(k) / k)


def upper_ends(x, k):
    return torch.quantile(x, (torch.arange(k) + 1) / k)


def one_too_many(x, k):
    return torch.quantile(x, (torch.arange(k) + 1) / (k + 1))


def evenly_apart(x, k):
    return torch.linspace(x.min().item(), x.max().item(), k)


def only_shares(x, k):
    return (torch.arange(k) + 0.5) / k


def equal_use_in_numpy(x, k):
    return np.quantile(x.numpy().astype(np.float64), (np.arange(k) + 0.5) / k)


def nearest_elements(x, k):
    return torch.quantile(x, (torch.arange(k) + 0.5) / k, interpolation="nearest")


def _sums(codes, values, k):
    return torch.zeros(k).index_add(0, codes, values)


def plain_mean(x, weight, codes, k):
    return _sums(codes, x, k) / torch.bincount(codes, minlength=k)


def over_the_count(x, weight, codes, k):
    return _sums(codes, weight * x, k) / torch.bincount(codes, minlength=k)


def weight_squared(x, weight, codes, k):
    return _sums(codes, weight**2 * x, k) / _sums(codes, weight**2, k)


def weight_rooted(x, weight, codes, k):
    return _sums(codes, weight.sqrt() * x, k) / _sums(codes, weight.sqrt(), k)


def not_divided(x, weight, codes, k):
    return _sums(codes, weight * x, k)


def over_all_weights(x, weight, codes, k):
    return _sums(codes, weight * x, k) / weight.sum()


def looped_tensor(x, weight, codes, k):
    return torch.stack([(weight * x)[codes == i].sum() / weight[codes == i].sum() for i in range(k)])


def averaged_in_numpy(x, weight, codes, k):
    x, weight, codes = x.numpy(), weight.numpy(), codes.numpy()
    return np.array([np.average(x[codes == i], weights=weight[codes == i]) for i in range(k)])


WRONG = {
    "04.1": [
        (gives_entries, "return their indices"),
        (entry_below, "entry below x"),
        (entry_above, "entry above x"),
        (with_its_sign, "with its sign"),
        (with_the_other_sign, "with its sign"),
        (the_furthest, "furthest away"),
        (as_if_uniform, "equally far apart"),
    ],
    "04.2": [
        (empty_is_nan, "NaN: no number chose it"),
        (empty_is_zero, "went to 0"),
        (medians, "median"),
        (torch_medians, "median"),
        (middles, "middle of its range"),
        (sums, "these are sums"),
        (from_below, "centre below it"),
        (does_not_move, "did not move"),
        (borders, "borders between"),
    ],
    "04.3": [
        (from_end_to_end, "i / (k - 1)"),
        (lower_ends, "lower end"),
        (upper_ends, "upper end"),
        (one_too_many, "(k + 1)"),
        (evenly_apart, "equally far apart"),
        (only_shares, "these are the shares"),
    ],
    "04.4": [
        (plain_mean, "plain mean"),
        (over_the_count, "how many numbers"),
        (weight_squared, "square of the weight"),
        (weight_rooted, "root of the weight"),
        (not_divided, "forgot to divide"),
        (over_all_weights, "sum of all weights"),
    ],
}
RIGHT = {
    "04.1": [by_borders, by_squares_in_numpy, one_at_a_time],
    "04.2": [with_bincount, in_place],
    "04.3": [equal_use_in_numpy, nearest_elements],
    "04.4": [looped_tensor, averaged_in_numpy],
}
