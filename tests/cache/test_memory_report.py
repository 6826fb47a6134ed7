"""Bytes: what is held, counted by a walk over the objects that does not ask the cache, and what the format promises."""

import gc
import types
import weakref

import pytest
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.integrations.transformers.cache_layer import HeadQCacheLayer

AFFINE = {"key_codec": "affine", "value_codec": "affine"}
FAST = {"epoch_tokens": 32, "residual_length": 32, "block_size": 16}


def tensors_within(root, leave_out=()):
    """Tensors reachable through attributes, containers and inner tensors, but not through ``leave_out``."""
    seen, found, todo = {id(x) for x in leave_out}, [], [root]
    atoms = (str, bytes, int, float, bool, type(None), type, types.ModuleType, types.FunctionType, torch.dtype)
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, atoms):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.append(x)
        if isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple, set, frozenset)):
            todo += x
        todo += getattr(x, "__dict__", {}).values()
    return found


def storage_bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(n for pointer, n in storages.items() if pointer)


def walked(cache, model):
    """Bytes found by the walk. What all caches of a model share is the model's."""
    shared = tensors_within([m.headq for m in model.modules() if hasattr(m, "headq")])
    shared += tensors_within(cache.config.calibration) if cache.config.calibration else []
    pointers = {t.untyped_storage().data_ptr() for t in shared}
    constants = {t.untyped_storage().data_ptr() for layer in cache.layers for t in constants_of(layer)}
    found = [t for t in tensors_within(cache) if t.untyped_storage().data_ptr() not in pointers | constants]
    return storage_bytes(found)


def constants_of(layer):
    """Rotation, levels and weights of a codec, and its frame: the same for every sequence and every prompt."""
    sides = [x for x in (layer.codec.keys, layer.codec.values) if x is not None] if layer.is_initialized else []
    own = {t.untyped_storage().data_ptr() for side in sides for t in side.own_tensors().values()}
    every = [t for side in sides for t in side.tensors().values()]
    frame = getattr(layer.codec, "frame", None) if layer.is_initialized else None
    every += [] if frame is None else [frame.table, frame.partner]
    return [t for t in every if t.untyped_storage().data_ptr() not in own]


def forward(model, ids, sizes, mask=None):
    cache, at = HeadQCache(model), 0
    with torch.no_grad():
        for part in ids.split(sizes, 1):
            at += part.shape[1]
            model(part, attention_mask=None if mask is None else mask[:, :at], cache=cache)
    return cache


VARIANTS = {
    "default": {},
    "side code": {"rank": 16},
    "affine": AFFINE,
    "random basis": AFFINE | {"basis": "random"},
    "score_optimal": AFFINE | {"basis": "score_optimal"},
    "keys only": {"v_bits": None},
    "values only": {"k_bits": None},
    "zero points": AFFINE | {"k_zero_point": True, "v_zero_point": True},
    "no side code": AFFINE | {"rank": 0},
    "nearest codes": {"error_feedback": False},
    "statistics awaited": {"epoch_tokens": 256},
    "calibrated": {"calibration": True},
    "calibrated, epoch awaited": {"calibration": True, "epoch_tokens": 256},
    "calibrated off": {"calibration": True, "adapt": "off"},
    "affine, calibrated": AFFINE | {"calibration": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("ragged", [False, True])
def test_footprint_is_what_a_walk_finds(tiny, token_ids, variant, family, ragged):
    model, options = tiny(family), dict(VARIANTS[variant])
    if options.get("calibration"):
        options["calibration"] = calibrate(model, [token_ids(2, 200)], progress=False)
    quantize_(model, headq_config(**FAST | options))
    mask = torch.ones(3, 200, dtype=torch.long)
    if ragged:
        mask[0, :90], mask[1, :20] = 0, 0
    cache = forward(model, token_ids(3, 200), [100, 30, *[1] * 20, 50], mask)

    def check():
        footprint = cache.get_memory_footprint()
        assert footprint == walked(cache, model) > 0
        report = cache.bits_report()
        assert sum(report.bytes.values()) == footprint
        assert min(report.bytes.values()) >= 0
        return footprint

    before = check()
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    after = check()
    if family == "llama":
        column = 2 * 2 * 3 * 4  # of the block table, here and on the device, before the old one is let go
        assert after <= before + column, "reordering made a batch larger"
        cache.crop(-100)
        check()
        with torch.no_grad():
            model(token_ids(3, 40, seed=1), cache=cache)
        check()
    cache.batch_repeat_interleave(2)
    assert check() > 1.5 * after * (1 if family == "mistral" else 0.8)


@pytest.mark.parametrize(
    ("options", "head_dim", "key_bits", "value_bits"),
    [
        # 2 bits + 8/D of a whitened key's scale, 16/D of another's
        ({}, 64, 2 + 8 / 64, 2 + 16 / 64),
        ({"scale_bits": 16}, 64, 2 + 16 / 64, 2 + 16 / 64),
        # and R·2/D side bits of keys
        (AFFINE, 64, 2 + 16 * 2 / 64 + 16 / 64, 2 + 16 / 64),
        ({"rank": 16}, 64, 2 + 16 * 2 / 64 + 8 / 64, 2 + 16 / 64),
        (AFFINE | {"k_zero_point": True, "v_zero_point": True}, 64, 2.75 + 0.25, 2.25 + 0.25),
        (AFFINE | {"rank": 0, "v_group_size": 32}, 64, 2 + 0.25, 2 + 2 * 0.25),
        ({"rank": 8, "side_bits": 4, "k_bits": 3, "v_bits": 3, "block_size": 32}, 64, 3 + 0.5 + 0.125, 3.25),
        ({"k_bits": 4, "v_bits": 4}, 128, 4 + 0.0625, 4 + 0.125),
        (AFFINE | {"k_bits": 4, "v_bits": 4}, 128, 4 + 0.5 + 0.125, 4 + 0.125),
        ({"k_bits": 1, "v_bits": 1, "rank": 0, "block_size": 32}, 64, 1.125, 1.25),
        ({"k_bits": 8, "v_bits": 6, "rank": 0}, 64, 8.25, 6.25),
        # the default rank is a whole granule: 16 coordinates, where a quarter of 80 would be 20 and stored as 32
        (AFFINE, 80, 96 * 2 / 80 + 16 / 80, 2 + 16 / 80),
        ({}, 80, 2 + 8 / 80, 2 + 16 / 80),
        ({"v_bits": None}, 64, 2.125, None),
        ({"v_bits": None, "key_codec": "affine"}, 64, 2.75, None),
        ({"k_bits": None}, 64, None, 2.25),
    ],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_body_bits_are_those_of_the_format(tiny, token_ids, options, head_dim, key_bits, value_bits, ragged):
    model = tiny(head_dim=head_dim)
    quantize_(model, headq_config(**FAST | options))
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[0, : 37 if ragged else 0] = 0
    cache = forward(model, token_ids(2, 150), [120, *[1] * 10, 20], mask)
    report = cache.bits_report()
    assert (report.key_body_bits, report.value_body_bits) == (key_bits, value_bits)
    packed = [b for b in (key_bits, value_bits) if b is not None]
    assert cache.packed_bits_per_element == report.packed_bits_per_element == sum(packed) / len(packed)
    assert report.tokens == (150 + 113) / 2 if ragged else 150
    assert report.packed_rows + report.exact_rows == report.tokens
    assert (report.key_bits_at_t is None) == (key_bits is None)
    if key_bits is not None:
        own = report.bytes["bases"] + report.bytes["moments"]
        assert own > 0
        elements = 2 * 2 * report.tokens * 2 * head_dim
        assert report.key_bits_at_t == pytest.approx(key_bits + 8 * own / elements)


def test_nothing_is_packed_yet(tiny, token_ids):
    model = tiny()
    quantize_(model, headq_config())
    cache = HeadQCache(model)
    assert (cache.get_memory_footprint(), cache.packed_fraction, cache.batch_size) == (0, 0.0, None)
    assert sum(cache.bits_report().bytes.values()) == 0
    cache = forward(model, token_ids(1, 20), [20])
    report = cache.bits_report()
    assert report.key_body_bits is None and report.value_body_bits is None
    assert report.packed_bits_per_element != report.packed_bits_per_element
    assert report.exact_rows == 20


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (AFFINE, 64 * 16 + 64 + 16),  # basis, mean, steps
        ({}, 64 * 16 + 64 + 64),  # seen directions, mean, spread
        ({"rank": 16}, 2 * 64 * 16 + 64 + 64 + 16),
        ({"error_feedback": False}, 64 + 64),
        ({"rank": 16, "basis": "score_optimal"}, 3 * 64 * 16 + 64 + 64 + 16),
    ],
    ids=str,
)
def test_basis_is_stored_once(tiny, token_ids, options, numbers):
    """A basis that reads as it encodes is one fp16 [Hkv, D, R] per sequence, also for ragged and reordered rows."""
    model = tiny(head_dim=64)
    quantize_(model, headq_config(**FAST | options))
    mask = torch.ones(3, 150, dtype=torch.long)
    expected = 2 * 3 * 2 * numbers * 2  # layers · B · Hkv · numbers · 2 bytes
    for start in (0, 50):
        mask[0, :start] = 0
        cache = forward(model, token_ids(3, 150), [150], mask)
        assert cache.bits_report().bytes["bases"] == expected
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert cache.bits_report().bytes["bases"] == expected


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("calibrated", [False, True])
def test_slack_is_an_eighth_and_a_block(tiny, token_ids, block_size, calibrated):
    model = tiny(layers=1)
    calibration = calibrate(model, [token_ids(2, 200)], progress=False) if calibrated else None
    options = FAST | {"block_size": block_size, "v_bits": 4}
    quantize_(model, headq_config(**options, calibration=calibration, adapt="off"))
    cache, packed = HeadQCache(model), 0
    for part in token_ids(1, 1500).split([300, *[1] * 40, *[13] * 80, 120], 1):
        with torch.no_grad():
            model(part, cache=cache)
        (layer,) = cache.layers
        (packed,) = cache.batch.lengths.packed()
        room = layer.table.columns * block_size
        assert packed <= room <= packed * 9 / 8 + 2 * block_size and layer.pool.pages == layer.table.pages
        assert layer.pool.pages == layer.table.columns + 1, "a page that nobody has"
        if packed:
            assert layer.window.k.shape[2] == 4 + layer.ring
    assert packed > 1200


@pytest.mark.parametrize("options", [{}, {"epoch_tokens": 512}, {"v_bits": None}])
def test_prefill_states_are_released(tiny, token_ids, monkeypatch, options):
    """After prefill the cache holds copies of what stays exact, no view that keeps the prompt's states alive."""
    model = tiny()
    quantize_(model, headq_config(**FAST | options))
    references, original = [], HeadQCacheLayer.update

    def update(self, k, v, *args, **kwargs):
        references.extend(weakref.ref(x.untyped_storage()) for x in (k, v))
        pointers.update(x.untyped_storage().data_ptr() for x in (k, v))
        return original(self, k, v, *args, **kwargs)

    pointers = set()
    monkeypatch.setattr(HeadQCacheLayer, "update", update)
    cache = forward(model, token_ids(1, 400), [400])
    gc.collect()
    assert len(references) == 4
    held = {t.untyped_storage().data_ptr() for t in tensors_within(cache)}
    assert held.isdisjoint(pointers) or not any(r() is not None for r in references)
    biggest = max(t.untyped_storage().nbytes() for t in tensors_within(cache))
    assert biggest <= (400 if options else 150) * 4 * 32 * 4
    for t in tensors_within(cache):
        assert t.untyped_storage().nbytes() == t.nbytes, "a view keeps a larger storage alive"


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_quarter_of_the_dynamic_cache(tiny, token_ids, calibrated):
    """bf16, head_dim 64, 4096 tokens, batch 1, defaults: everything held is at most 1/4 of the dense cache."""
    model = tiny(head_dim=64, heads=2, kv_heads=1).bfloat16()
    ids, dense = token_ids(1, 4096), DynamicCache()
    with torch.no_grad():
        model.model(ids, cache=dense)
    dense_bytes = sum(t.nbytes for layer in dense.layers for t in (layer.keys, layer.values))
    assert dense_bytes == 2 * 2 * 4096 * 64 * 2
    calibration = calibrate(model, [ids[:, :1024]], progress=False) if calibrated else None
    quantize_(model, headq_config(calibration=calibration))
    cache = forward(model, ids, [4096])
    assert cache.get_memory_footprint() == walked(cache, model)
    assert cache.get_memory_footprint() <= dense_bytes / 4
    with torch.no_grad():
        for _ in range(40):
            model(ids[:, :1], cache=cache)
    assert cache.get_memory_footprint() <= dense_bytes / 4
    assert cache.packed_fraction > 0
