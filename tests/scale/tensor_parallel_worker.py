"""One rank of a tensor-parallel run, started by torchrun: ``worker.py JOBS.json OUT`` writes OUT.RANK.json."""

import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from headq_ao import HeadQCache, calibrate, headq_config, quantize_


def run(name, job, rank):
    """Greedy tokens and what the cache of this rank holds."""
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=dtype, distributed_config=DistributedConfig(tp_plan="auto")
    )
    model.generation_config.eos_token_id = None
    ids = torch.tensor(job["ids"])
    if "error" in job:
        try:
            quantize_(model, headq_config(**job["options"]))
        except ValueError as error:
            return {"error": str(error)}
        return {}
    result = {}
    if job.get("calibrate"):
        calibration = calibrate(model, [torch.tensor(job["calibrate"])], progress=False)
        if rank == 0:
            calibration.save(job["folder"] + "/from_ranks.safetensors")
    quantize_(model, headq_config(**job["options"]))
    cache = HeadQCache(model)
    tokens = model.generate(ids, max_new_tokens=job["new"], do_sample=False, cache=cache, pad_token_id=0)
    heads = sorted({layer.window.k.shape[1] for layer in cache.layers})
    result |= {"tokens": tokens.tolist(), "heads": heads, "bytes": cache.get_memory_footprint()}
    path = f"{job['folder']}/{name}.{rank}.safetensors"
    cache.save(path)
    with torch.no_grad():
        logits = [model(ids[:, :1], cache=c, logits_to_keep=1).logits for c in (HeadQCache.load(path, model), cache)]
    result["cache_reloads"] = torch.equal(*logits)
    return result


def main():
    warnings.simplefilter("error")
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = {name: run(name, job, rank) for name, job in jobs.items()}
    Path(f"{sys.argv[2]}.{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
