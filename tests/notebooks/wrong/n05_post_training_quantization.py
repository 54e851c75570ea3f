"""Notebook 05: answers that are wrong in a known way, and honest variants."""

import math

import torch.nn.functional as F


def no_shift(logits, tokens):
    return math.exp(F.cross_entropy(logits, tokens))


def stays_in_nats(logits, tokens):
    return F.cross_entropy(logits[:-1], tokens[1:]).item()


def mean_of_perplexities(logits, tokens):
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="none").exp().mean().item()


def sums_up(logits, tokens):
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="sum").exp().item()


def overflows(logits, tokens):
    p = logits[:-1].exp() / logits[:-1].exp().sum(-1, keepdim=True)
    return (-p.gather(1, tokens[1:, None]).log().mean()).exp().item()


def looped_perplexity(logits, tokens):
    total = 0.0
    for t in range(len(tokens) - 1):
        row = logits[t].double()
        total += (row.logsumexp(0) - row[tokens[t + 1]]).item()
    return math.exp(total / (len(tokens) - 1))


def one_call(logits, tokens):
    return F.cross_entropy(logits[:-1], tokens[1:]).exp()


def wrong_way_round(reference, quantized):
    p, q = quantized.log_softmax(-1), reference.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def mean_over_vocabulary(reference, quantized):
    p, q = reference.log_softmax(-1), quantized.log_softmax(-1)
    return (p.exp() * (p - q)).mean().item()


def torch_defaults(reference, quantized):
    return F.kl_div(
        reference.log_softmax(-1), quantized.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()


def unstable(reference, quantized):
    p, q = reference.softmax(-1), quantized.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean().item()


def raw_logits(reference, quantized):
    return (reference.softmax(-1) * (reference - quantized)).sum(-1).mean().item()


def by_torch(reference, quantized):
    return F.kl_div(
        quantized.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def looped_kl(reference, quantized):
    total = 0.0
    for p, q in zip(reference.double(), quantized.double(), strict=True):
        p, q = p - p.logsumexp(0), q - q.logsumexp(0)
        total += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    return total / len(reference)


def by_perplexity(reports, budget):
    fitting = [r for r in reports if r.bytes <= budget]
    return min(fitting, key=lambda r: r.perplexity).recipe if fitting else None


def ignores_budget(reports, budget):
    return min(reports, key=lambda r: r.kl).recipe


def smallest(reports, budget):
    fitting = [r for r in reports if r.bytes <= budget]
    return min(fitting, key=lambda r: r.bytes).recipe if fitting else None


def strictly_below(reports, budget):
    fitting = [r for r in reports if r.bytes < budget]
    return min(fitting, key=lambda r: r.kl).recipe if fitting else None


def fails_on_none(reports, budget):
    return min((r for r in reports if r.bytes <= budget), key=lambda r: r.kl).recipe


def sorted_first(reports, budget):
    for report in sorted(reports, key=lambda r: r.kl):
        if report.bytes <= budget:
            return report.recipe
    return None


WRONG = {
    "05.1": [
        (no_shift, "about tokens[t + 1]"),
        (stays_in_nats, "exponential"),
        (mean_of_perplexities, "average the cross-entropies"),
        (sums_up, "mean"),
        (overflows, "log_softmax"),
    ],
    "05.2": [
        (wrong_way_round, "wrong direction"),
        (mean_over_vocabulary, "mean over the vocabulary"),
        (torch_defaults, "wrong direction"),
        (unstable, "not finite"),
        (raw_logits, "not normalised"),
    ],
    "05.3": [
        (by_perplexity, "rank by KL"),
        (ignores_budget, "over the budget"),
        (smallest, "smallest"),
        (strictly_below, "171"),
        (fails_on_none, "empty sequence"),
    ],
}
RIGHT = {
    "05.1": [looped_perplexity, one_call],
    "05.2": [by_torch, looped_kl],
    "05.3": [sorted_first],
}
