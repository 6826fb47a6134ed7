"""An engine of so many CPU ranks, in processes of their own: what it says, and the pages of each rank, as JSON.

``python -m tests.vllm.tensor_parallel MODEL CALIBRATION RANKS``.
"""

import json
import os
import sys


def pages_of_rank(worker):
    """KV heads of a layer; of each layer the bytes of a packed page, and those that a rank keeps for one."""
    layers = worker.vllm_config.compilation_config.static_forward_context
    own = [x for name, x in sorted(layers.items()) if name.endswith("self_attn.attn")]
    dtype = own[0].impl.pages.kv.window_k.dtype
    layouts = [(layer.impl, layer.impl.pages.layout) for layer in own]
    return {
        "kv_heads": own[0].num_kv_heads,
        "page_bytes": [layout.bytes_of_page(impl.n_sink, dtype) for impl, layout in layouts],
        "kept": [impl.page_bytes(layout.page_tokens, dtype) for impl, layout in layouts],
    }


def main(model, calibration, ranks):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(["0"] * ranks)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to ask the ranks of this program's own code
    from tests.vllm.engines import generate, greedy, headq_options, ids, start, tokens_of

    llm = start(model, tensor_parallel_size=ranks, **headq_options(calibration))
    outputs = generate(llm, [ids(300, seed) for seed in range(3)], greedy(30))
    print(json.dumps({"tokens": [tokens_of(o) for o in outputs], "ranks": llm.collective_rpc(pages_of_rank)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
