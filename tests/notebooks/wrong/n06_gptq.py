"""Notebook 06: answers that are wrong in a known way, and honest variants."""

import numpy as np
import torch


def sums(inputs):
    x = inputs.reshape(-1, inputs.shape[-1])
    return x.T @ x


def divides_by_windows(inputs):
    x = inputs.reshape(-1, inputs.shape[-1])
    return x.T @ x / len(inputs)


def token_by_token(inputs):
    x = inputs.reshape(-1, inputs.shape[-1])
    return x @ x.T / len(x)


def centres(inputs):
    x = inputs.reshape(-1, inputs.shape[-1])
    x = x - x.mean(dim=0)
    return x.T @ x / len(x)


def papers_factor(inputs):
    x = inputs.reshape(-1, inputs.shape[-1])
    return 2 * x.T @ x / len(x)


def looped_hessian(inputs):
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    total = torch.zeros(x.shape[1], x.shape[1])
    for token in x:
        total += torch.outer(token, token)
    return total / len(x)


def as_array(inputs):
    return einsum_hessian(inputs).numpy()


def einsum_hessian(inputs):
    x = inputs.reshape(-1, inputs.shape[-1])
    return torch.einsum("ti,tj->ij", x, x) / x.shape[0]


def adds(weights_right, error, hinv_row):
    return weights_right + torch.outer(error, hinv_row)


def change_alone(weights_right, error, hinv_row):
    return -torch.outer(error, hinv_row)


def next_column_alone(weights_right, error, hinv_row):
    weights_right[:, 0] -= error * hinv_row[0]
    return weights_right


def divides_again(weights_right, error, hinv_row):
    return weights_right - torch.outer(error, hinv_row) / hinv_row[0]


def transposed(weights_right, error, hinv_row):
    return weights_right - torch.outer(hinv_row, error)


def element_by_element(weights_right, error, hinv_row):
    return weights_right - error * hinv_row


def nothing_returned(weights_right, error, hinv_row):
    weights_right -= torch.outer(error, hinv_row)


def in_half_the_bits(weights_right, error, hinv_row):
    return (weights_right - torch.outer(error, hinv_row)).float()


def looped_update(weights_right, error, hinv_row):
    out = torch.empty_like(weights_right)
    for row in range(weights_right.shape[0]):
        for column in range(weights_right.shape[1]):
            out[row, column] = weights_right[row, column] - error[row] * hinv_row[column]
    return out


def row_by_row(weights_right, error, hinv_row):
    return torch.stack([right - e * hinv_row for right, e in zip(weights_right, error, strict=True)])


def column_by_column(weights_right, error, hinv_row):
    for column in range(len(hinv_row)):
        weights_right[:, column] -= error * hinv_row[column]
    return weights_right


def in_place_update(weights_right, error, hinv_row):
    return weights_right.addr_(error, hinv_row, alpha=-1)


def ascends(weight, hessian):
    order = hessian.diagonal().argsort()
    return weight[:, order], hessian[order][:, order], order.argsort()


def rows_only(weight, hessian):
    order = hessian.diagonal().argsort(descending=True)
    return weight[:, order], hessian[order], order.argsort()


def forgets_hessian(weight, hessian):
    order = hessian.diagonal().argsort(descending=True)
    return weight[:, order], hessian, order.argsort()


def returns_order(weight, hessian):
    order = hessian.diagonal().argsort(descending=True)
    return weight[:, order], hessian[order][:, order], order


def numpy_order(weight, hessian):
    order = np.argsort(-np.diag(hessian.numpy()))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    h = hessian.numpy()[np.ix_(order, order)]
    return weight[:, torch.from_numpy(order)], torch.from_numpy(h), torch.from_numpy(back)


def float_back(weight, hessian):
    order = hessian.diagonal().argsort(descending=True)
    return weight[:, order], hessian[order][:, order], order.argsort().float()


WRONG = {
    "06.1": [
        (sums, "sum over the tokens"),
        (divides_by_windows, "the windows"),
        (token_by_token, "row for each token"),
        (centres, "covariance"),
        (papers_factor, "twice"),
        (as_array, "expected a torch tensor"),
    ],
    "06.2": [
        (adds, "subtract"),
        (change_alone, "the change alone"),
        (next_column_alone, "first column alone"),
        (divides_again, "divided by the diagonal already"),
        (transposed, "transposed"),
        (element_by_element, "element by element"),
        (nothing_returned, "None"),
        (in_half_the_bits, "keep the dtype"),
    ],
    "06.3": [
        (ascends, "ascends"),
        (rows_only, "only the rows"),
        (forgets_hessian, "not permuted"),
        (returns_order, "inverse"),
        (float_back, "whole numbers"),
    ],
}
RIGHT = {
    "06.1": [looped_hessian, einsum_hessian],
    "06.2": [looped_update, row_by_row, column_by_column, in_place_update],
    "06.3": [numpy_order],
}
