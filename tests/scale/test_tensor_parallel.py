"""transformers' tensor parallelism: each rank keeps the KV heads that it owns, and the tokens are those of one process.

The ranks of all jobs run in one launch of torchrun per number of processes: starting Python is most of the time.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headq_ao import Calibration, HeadQCache, calibrate, headq_config, quantize_
from headq_ao.calibration.rope import rotation_of
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.evals.harness import inputs
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.models import attention_modules, rotary_embedding
from headq_ao.statistics.moments import FISHER, TENSORS
from tests.conftest import build_tiny
from tests.scale.conftest import torchrun

pytestmark = pytest.mark.xdist_group("processes")
WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
FAMILIES = {"llama": 2, "qwen3": 2, "mistral": 2, "gemma3": 2, "gpt_neox": 4, "phi3": 2}  # with their KV heads
WHOLE = ("phi3",)  # its plan gathers q, k and v, so that each rank attends with all heads
UNCALIBRATED = ("llama", "gemma3")
FAST = {"warmup_tokens": 64, "residual_length": 32, "block_size": 16}
NEW = 24


def token_ids(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def single_process(job):
    """The job without torchrun: tokens, and bytes of the cache."""
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"]))
    model.generation_config.eos_token_id = None
    quantize_(model, headq_config(**job["options"]))
    cache, ids = HeadQCache(model), torch.tensor(job["ids"])
    tokens = model.generate(ids, max_new_tokens=job["new"], do_sample=False, cache=cache, pad_token_id=0)
    return {"tokens": tokens.tolist(), "bytes": cache.get_memory_footprint()}


def run_ranks(processes, jobs, folder):
    """Results of each rank, and of a single process."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(processes, WORKER, folder / "jobs.json", folder / "out")
    assert done.returncode == 0, done.stdout[-4000:]
    ranks = [json.loads((folder / f"out.{rank}.json").read_text()) for rank in range(processes)]
    return ranks, {name: single_process(job) for name, job in jobs.items() if "error" not in job}


def tiny_jobs(folder):
    jobs = {}
    for family, kv_heads in FAMILIES.items():
        model = build_tiny(family, head_dim=32, heads=4, kv_heads=kv_heads)
        model.save_pretrained(folder / family)
        calibration = calibrate(model, [token_ids(2, 150, seed=9)], progress=False)
        calibration.save(folder / f"{family}.safetensors")
        job = {"folder": str(folder / family), "dtype": "float32", "ids": token_ids(2, 150).tolist(), "new": NEW}
        if family in UNCALIBRATED:
            jobs[family] = job | {"options": FAST}
        jobs[f"{family} calibrated"] = job | {"options": FAST | {"calibration": str(folder / f"{family}.safetensors")}}
    jobs["llama calibrated"] |= {"calibrate": token_ids(2, 150, seed=9).tolist()}
    for kv_heads in (1, 3):
        build_tiny("llama", heads=6, kv_heads=kv_heads).save_pretrained(folder / f"kv{kv_heads}")
        jobs[f"kv{kv_heads}"] = jobs["llama"] | {"folder": str(folder / f"kv{kv_heads}"), "error": True}
    jobs["uncalibrated random"] = jobs["llama"] | {"options": FAST | {"rank": 16, "basis": "random"}, "error": True}
    return jobs


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder, results of two ranks, results of one process."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *run_ranks(2, tiny_jobs(folder), folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*UNCALIBRATED, *(f"{family} calibrated" for family in FAMILIES)])
def test_tiny(two, name):
    _, ranks, alone = two
    family = name.split()[0]
    assert [rank[name]["tokens"] for rank in ranks] == [alone[name]["tokens"]] * 2
    held = FAMILIES[family] if family in WHOLE else FAMILIES[family] // 2
    assert [rank[name]["heads"] for rank in ranks] == [[held]] * 2
    share = sum(rank[name]["bytes"] for rank in ranks) / alone[name]["bytes"]
    # each rank has lengths and block tables of its own
    assert share == pytest.approx(2 if family in WHOLE else 1, rel=0.005)
    assert all(rank[name]["cache_reloads"] for rank in ranks)


@pytest.mark.parametrize("basis", [None, "query_pca", "score_optimal", "key_pca", "random"])
@pytest.mark.parametrize("codec_name", ["whitened", "affine"])
def test_a_codec_made_for_all_heads_is_cut(tiny, codec_name, basis):
    """Bit for bit, also where the basis of a head depends on how many there are; values like keys."""
    model = tiny(heads=8, kv_heads=4)
    calibration = calibrate(model, [token_ids(2, 150)], progress=False)
    options = {"rank": 0} if basis is None else {"rank": 16, "basis": basis}
    config = headq_config(key_codec=codec_name, value_codec=codec_name, calibration=calibration, **options)
    shape = layer_shapes(model.config)[0]
    rotation = rotation_of(rotary_embedding(model), attention_modules(model, 1)[0], shape)
    whole = LayerCodec(config, shape, calibration.layers[0], torch.device("cpu"), rotation=rotation)
    assert ("hessian" in whole.calibrated.tensors()) == ("mean" in whole.values.tensors()) == (codec_name == "whitened")
    for part in (slice(0, 2), slice(2, 4)):
        mine = dataclasses.replace(shape, n_heads=4, n_kv_heads=2)
        codec = LayerCodec(config, mine, calibration.layers[0], torch.device("cpu"), part, rotation=rotation)
        for a, b in ((whole.calibrated, codec.calibrated), (whole.values, codec.values)):
            assert a.tensors().keys() == b.tensors().keys()
            for name, tensor in a.tensors().items():
                assert torch.equal(b.tensors()[name], tensor[:, part] if tensor.shape[1] == 4 else tensor), name


@pytest.mark.slow
def test_a_basis_drawn_by_each_rank_is_refused(two):
    _, ranks, _ = two
    for rank in ranks:
        assert "basis='random' on a tensor-parallel model needs a calibration" in rank["uncalibrated random"]["error"]


@pytest.mark.slow
def test_calibration_by_all_ranks_is_that_of_one(two):
    folder, _, _ = two
    whole = Calibration.load(folder / "llama.safetensors")
    ranks = Calibration.load(folder / "llama" / "from_ranks.safetensors")
    ranks.check_model(whole.fingerprint)
    for a, b in zip(whole.layers, ranks.layers, strict=True):
        assert (a.tokens, a.groups) == (b.tokens, b.groups)
        for name in TENSORS:
            assert (getattr(a, name) - getattr(b, name)).norm() < 1e-4 * getattr(a, name).norm()
        for name in FISHER:
            assert (getattr(a, name) - getattr(b, name)).norm() < 1e-3 * getattr(a, name).norm()


@pytest.mark.slow
def test_heads_that_do_not_divide_are_refused(two):
    _, ranks, _ = two
    for rank in ranks:
        assert "llama has 3 KV heads (6 query heads), which cannot be divided among 2" in rank["kv3"]["error"]
        assert rank["kv3"]["error"].endswith("use 3")
        assert rank["kv1"]["error"].endswith("tensor-parallel processes; run it on one, or data-parallel")


@pytest.mark.slow
def test_a_prompt_cache_belongs_to_its_rank(two):
    folder, _, _ = two
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    quantize_(model, headq_config(**FAST))
    with pytest.raises(ValueError, match="other attention heads, as on another rank of a tensor-parallel model"):
        HeadQCache.load(folder / "llama" / "llama.0.safetensors", model)


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_on_three(tmp_path, smollm2_folder):
    """Its 3 KV heads and 9 query heads: one and three for each of three processes."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    ids = inputs.token_rows(tokenizer, inputs.find_text("bundled", "report"), 1, 300)
    shutil.copytree(smollm2_folder, tmp_path / "model", copy_function=shutil.os.link)
    job = {"folder": str(tmp_path / "model"), "dtype": "float32", "ids": ids.tolist(), "new": 24, "options": {}}
    ranks, alone = run_ranks(3, {"smollm2": job}, tmp_path)
    assert [rank["smollm2"]["tokens"] for rank in ranks] == [alone["smollm2"]["tokens"]] * 3
    assert [rank["smollm2"]["heads"] for rank in ranks] == [[1]] * 3
