"""What codes stand for, and what is seen of their error, for tests."""

BITS = [1, 2, 3, 4, 5, 6, 8]


def decoded(codes, scale, step, bits):
    return scale.double()[..., None] * step.double().unsqueeze(-2) * (codes.double() - (2**bits - 1) / 2)


def seen_error(y, y_hat, metric):
    e = y.double() - y_hat
    return ((e @ metric.double()) * e).sum(-1)
