"""``recipes/multi_process.py``: two processes give, in order, what one gives."""

import json

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from headq_ao import calibrate
from headq_ao.evals.harness import inputs
from tests.conftest import ROOT, load_recipe
from tests.scale.conftest import torchrun

pytestmark = pytest.mark.xdist_group("processes")
SCRIPT = ROOT / "recipes" / "multi_process.py"
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2"]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("multi_process")


def words(rows, seed=0):
    """Lines of unequal length; most are long enough to be packed."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(60, 160, (rows,), generator=g).tolist()
    return "\n".join(" ".join(f"w{i}" for i in torch.randint(0, 125, (n,), generator=g).tolist()) for n in lengths)


@pytest.mark.slow
def test_two_processes_equal_one(recipe, tiny_folder, tmp_path):
    """Five batches over two processes, with one calibration file."""
    model, _ = inputs.load(str(tiny_folder), None, torch.float32)
    ids = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(9))
    calibrate(model, [ids], progress=False).save(tmp_path / "c.safetensors")
    (tmp_path / "prompts.txt").write_text(words(9))
    arguments = [tmp_path / "prompts.txt", "--model", tiny_folder, "--calibration", tmp_path / "c.safetensors"]
    arguments = [str(a) for a in [*arguments, "--batch-size", 2, "--max-new-tokens", 12]]
    assert recipe.main([*arguments, "--json", str(tmp_path / "one.json")]) == 0
    done = torchrun(2, SCRIPT, *arguments, "--json", tmp_path / "two.json")
    assert done.returncode == 0, done.stdout[-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["completions"] == one["completions"] and len(set(one["completions"])) == 9
    assert two["cache_bytes"] == one["cache_bytes"]
    assert (one["processes"], two["processes"], two["batches_of_process"]) == (1, 2, [3, 2])


def test_fewer_batches_than_processes(recipe, monkeypatch):
    """A process without work takes part in the gathering all the same."""
    state, made = PartialState(cpu=True), []
    monkeypatch.setattr(recipe, "complete", lambda model, tokenizer, prompts, new: {"texts": prompts})
    monkeypatch.setattr(recipe, "gather_object", lambda done: made.extend(done) or made)
    monkeypatch.setattr(state, "num_processes", 3)
    monkeypatch.setattr(state, "distributed_type", DistributedType.MULTI_CPU)
    for index in (2, 1, 0):
        monkeypatch.setattr(state, "process_index", index)
        results = recipe.run(state, None, None, recipe.batches_of(["a", "b", "c"], 2), 4)
    assert [i for i, _ in made] == [1, 0]
    assert [r["texts"] for r in results.values()] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_processes_gives_the_same(recipe, tiny, token_ids, family):
    """The split itself, on each architecture: the batches of two processes, one after the other, against one."""
    from headq_ao import headq_config, quantize_

    model = tiny(family)
    quantize_(model, headq_config(warmup_tokens=64, residual_length=32, block_size=16))

    class Tokenizer:
        pad_token_id = 0

        def __call__(self, prompts, **options):
            import transformers

            rows = [[int(w) for w in p.split()] for p in prompts]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
            return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})

        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(map(str, row)) for row in ids.tolist()]

    prompts = [" ".join(map(str, token_ids(1, 80 + 7 * i, seed=i)[0].tolist())) for i in range(5)]
    batches = recipe.batches_of(prompts, 2)
    done = [
        {i: recipe.complete(model, Tokenizer(), p, 6)["texts"] for i, p in part} for part in (batches[:2], batches[2:])
    ]
    whole = {i: recipe.complete(model, Tokenizer(), p, 6)["texts"] for i, p in batches}
    assert dict(sorted((done[1] | done[0]).items())) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nowhere.txt"], "nowhere.txt"),
        (["empty.txt"], "has no prompts; it must hold one a line"),
        (["p.txt", "--batch-size", "0"], "must be at least 1"),
        (["p.txt", "--json", "gone/out.json"], "no folder 'gone'"),
        (["p.txt", "--calibration", "gone.safetensors"], "no calibration file at 'gone.safetensors'"),
    ],
)
def test_mistakes_are_told(recipe, tiny_folder, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("w1 w2")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert recipe.main([*change, "--model", str(tiny_folder)]) == 2
    assert message in capsys.readouterr().err
