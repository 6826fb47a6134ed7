"""Options of tiny models, and calls of them, for tests."""

import torch

OPTIONS = {"epoch_tokens": 32, "residual_length": 32, "block_size": 16}
FINE = OPTIONS | {"k_bits": 8, "v_bits": 8, "rank": 0}


def greedy(model, ids, n=24, **kwargs):
    return model.generate(ids, max_new_tokens=n, do_sample=False, **kwargs)


def forward(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits
