"""``HeadQConfig``: what is stored for a key and a value, and how statistics are found."""

import dataclasses
import math
import os
from collections.abc import Callable, Container
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from headq_ao.byte_size import byte_size
from headq_ao.ops.layout import PIECES, granule
from headq_ao.ops.rounding import SCALE_BITS

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig
else:  # which it is a subclass of once torchao is imported (headq_ao.registration)
    AOBaseConfig = object

CodecName = Literal["whitened", "affine"]
Basis = Literal["query_pca", "score_optimal", "key_pca", "random"]
Adapt = Literal["off", "prompt"]

CONFIG_VERSION = 2
BLOCKS = (16, 32, 64, 128)
MOST = 2**31 - 1  # tokens and sizes
WIDEST_HEAD = 512  # coordinates of a key or value
MOST_SEED = 2**63 - 1

PRESETS: dict[str, dict[str, Any]] = {
    "headq_paper": {
        "key_codec": "affine",
        "value_codec": "affine",
        "k_zero_point": True,
        "v_zero_point": True,
        "rank": 8,
        "side_bits": 4,
        "basis": "query_pca",
        "adapt": "off",
    },
    "balanced": {"mean_bits": 2.375},
    "quality": {"mean_bits": 2.875, "k_bits": 3},
    "near_lossless": {"mean_bits": 4.0625, "k_bits": 4, "v_bits": 4},
    "compact": {"mean_bits": 1.875},
    "minimal": {"mean_bits": 1.375, "k_bits": 2, "v_bits": 1},
}
DEFAULT = "balanced"
OF_HEADQ = (
    "k_bits",
    "v_bits",
    "mean_bits",
    "key_codec",
    "value_codec",
    "whitening",
    "error_feedback",
    "k_zero_point",
    "v_zero_point",
    "rank",
    "side_bits",
    "value_weight",
    "basis",
    "sign",
    "rotation",
    "subtract_key_mean",
    "unbiased_scale",
    "scale_bits",
    "v_group_size",
    "adapt",
    "prior_tokens",
    "warmup_tokens",
    "cache_bytes",
)  # what shapes HeadQ's own codec
OLD_NAMES = ("key_gauge", "epoch_tokens")  # of subtract_key_mean and warmup_tokens
UNIFORM_ONLY = ("k_bits", "v_bits", "key_codec", "value_codec")  # given one of these, no bits are shared by default
OPTIONAL = ("rank", "warmup_tokens", "v_group_size", "context_length", "batch_size")
BITS = ("k_bits", "v_bits", "mean_bits")


@runtime_checkable
class CalibrationLike(Protocol):
    """What a config holds of a :class:`headq_ao.Calibration`, which knows more."""

    fingerprint: dict[str, Any]

    @property
    def suffices(self) -> bool:
        """Whether it was made of enough tokens to be used."""
        ...

    def check_model(self, fingerprint: dict[str, Any]) -> None:
        """Raise ValueError where it was made on another model."""
        ...


def _default(value: Any) -> Any:
    """``value`` as the default of a field, told apart from an equal one that a caller gives."""
    kind = type(value)
    return type(kind.__name__, (kind,), {})(value)


class Options(dict[str, Any]):
    """Options by name, not to be changed: a config with them has a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@dataclass(frozen=True)
class HeadQConfig(AOBaseConfig):
    """A packed KV cache with HeadQ keys, for :func:`headq_ao.quantize_`. :func:`headq_config` knows presets too.

    Fields are checked when a config is made and cannot be assigned afterwards; ``dataclasses.replace`` makes a changed
    one, which is checked as well. numpy's numbers are taken as Python's.

    Args:
        k_bits, v_bits: code bits per coordinate, 1 to 6 or 8; ``None`` keeps that side exact.
        mean_bits: code bits per coordinate, as a mean over KV heads and packed sides, allocated to heads by their
            sensitivity; needs a calibration, ``k_bits`` and ``v_bits`` hold without one. ``None``: ``k_bits`` and
            ``v_bits`` hold with one too, which is the default where either of them or a codec is given.
        key_codec, value_codec: ``"whitened"``: the same bits for each coordinate of the whitened, rotated token, codes
            chosen by error feedback; ``"affine"``: nearest codes of the rotated token. Values of a model without a
            calibration are always coded as ``"affine"``.
        whitening: power τ of the whitening ``C^{−τ/2}`` (``"whitened"``), 0 to 1.
        error_feedback: round with GPTQ-style error feedback, so that the error falls in directions that queries do not
            use (``"whitened"``); False: nearest codes.
        k_zero_point, v_zero_point: store a zero beside the scale (min-max range of the token); without it the levels
            stand around the mean (keys) or zero (values) and the token saves 16 bits.
        rank, side_bits: size of the side code of the key's error, 0: none; ``rank=None`` is 0 with ``"whitened"`` keys,
            where it does not pay, and a quarter of head_dim in steps of 16 (at least 16) with ``"affine"`` ones.
        basis: of the side code. ``"query_pca"``: top eigenvectors of ``E[q qᵀ]`` (the paper);
            ``"score_optimal"``: best rank-R pair for the score error; ``"key_pca"``, ``"random"``: controls.
        sign: ``+1``; ``-1`` adds the correction with the wrong sign (control).
        rotation: quantize in a Hadamard-rotated basis.
        subtract_key_mean: subtract a per-head mean from keys, which the softmax cancels.
        unbiased_scale: without a zero, store the scale that makes ``⟨y, ŷ⟩ = ‖y‖²`` (under error feedback's
            hessian, where there is one): codes of least error shrink a token, and that does not average out.
        scale_bits: that the scale of a token is stored in where it is whitened and rounded with error feedback: 8, one
            of 256 scales that codes are chosen for, with up to 4 code bits, or 16 (fp16), which all others have.
        value_weight: of a token that is key and value in one row (latent attention, MLA): how much its error as a value
            counts beside that as a key, a factor of λ in ``C_q + λ Σ W_uvᵀ W_uv``
            (:func:`headq_ao.codecs.whitened.readout_metric`); 0: it is coded as a key alone. ``None``: 1.
        v_group_size: coordinates of a value that share a scale; ``None`` is ``head_dim``.
        n_sink: first tokens of each sequence kept exact.
        residual_length: newest tokens kept exact, at least; up to ``residual_length + block_size − 1``.
        block_size: tokens packed at a time: 16, 32, 64 or 128.
        calibration: a :class:`headq_ao.Calibration`, the path of a saved one, or None: statistics then come from
            each sequence's own first tokens, whitened keys in the frame of their segment
            (:mod:`headq_ao.calibration.rope`).
            Only a path fits into JSON (torchao's ``config_to_dict``). One of too few effective tokens
            (:attr:`headq_ao.Calibration.suffices`) is not used, with a warning: all is as without.
        adapt: with a calibration, ``"off"`` takes it as it is, ``"prompt"`` as a prior for the key mean, which each
            prompt refines: 0 to 5 % less KL for a second segment to read.
        prior_tokens: how many tokens the calibration counts as under ``adapt="prompt"``.
        warmup_tokens: tokens after which a sequence's own statistics are used; ``None`` is ``max(256, 4·head_dim)``.
        check_finite: raise on non-finite keys or values; ``None``: on the CPU only.
        seed: of the random basis.
        cache_bytes: of the whole cache: :func:`headq_ao.quantize_` takes the most bits that fit, instead of ``k_bits``,
            ``v_bits`` and ``mean_bits``: a number of bytes, or text such as ``"8GiB"``. Counted as
            :func:`headq_ao.estimate_memory` does; weights and activations come on top.
        context_length: tokens that each sequence is expected to have: those that ``cache_bytes`` is for, and no spare
            room is made beyond; ``None``: not known.
        batch_size: sequences that ``cache_bytes`` is for; ``None``: one.
        codec: the name of a registered codec (:mod:`headq_ao.codecs.registry`) that takes the place of HeadQ's own,
            whose options must then be left out; ``None``: HeadQ's.
        codec_options: of that codec by name, plain data.
        key_gauge, epoch_tokens: old names of ``subtract_key_mean`` and ``warmup_tokens``, for one version, as
            ``"visible"`` is of ``"whitened"``.

    Raises:
        ValueError: on a value that is of the wrong kind, out of range, or does not fit the others.

    Example:
        >>> from headq_ao import HeadQConfig, headq_config
        >>> HeadQConfig() == headq_config(), HeadQConfig(k_bits=3) == headq_config(k_bits=3)
        (True, True)
        >>> HeadQConfig().mean_bits, HeadQConfig(k_bits=3).mean_bits
        (2.375, None)
    """

    k_bits: int | None = _default(2)
    v_bits: int | None = _default(2)
    mean_bits: float | None = _default(PRESETS[DEFAULT]["mean_bits"])
    key_codec: CodecName = _default("whitened")  # noqa: RUF009, a str
    value_codec: CodecName = _default("whitened")  # noqa: RUF009
    whitening: float = 0.75
    error_feedback: bool = True
    k_zero_point: bool = False
    v_zero_point: bool = False
    rank: int | None = None
    side_bits: int = 2
    basis: Basis = "query_pca"
    sign: int = 1
    rotation: bool = True
    subtract_key_mean: bool = True
    unbiased_scale: bool = True
    scale_bits: int = _default(8)
    value_weight: float | None = None
    v_group_size: int | None = None
    n_sink: int = 4
    residual_length: int = 80
    block_size: int = 32
    calibration: CalibrationLike | str | os.PathLike[str] | None = None
    adapt: Adapt = "off"
    prior_tokens: int = 256
    warmup_tokens: int | None = None
    check_finite: bool | None = None
    seed: int = 0
    cache_bytes: int | str | None = None
    context_length: int | None = None
    batch_size: int | None = None
    codec: str | None = None
    codec_options: dict[str, Any] | None = None
    version: int = CONFIG_VERSION
    key_gauge: InitVar[bool | None] = None
    epoch_tokens: InitVar[int | None] = None

    def __post_init__(self, key_gauge: bool | None, epoch_tokens: int | None) -> None:
        fields = dataclasses.fields(self)
        given = {f.name for f in fields if getattr(self, f.name) is not f.default}
        self._take_old_names({"subtract_key_mean": key_gauge, "warmup_tokens": epoch_tokens})
        if self.cache_bytes is not None:
            self._leave_bits(given & set(BITS))
        elif given & set(UNIFORM_ONLY) and "mean_bits" not in given:
            object.__setattr__(self, "mean_bits", None)
        for f in fields:
            object.__setattr__(self, f.name, _plain(getattr(self, f.name)))
        if self.version == 1 and "scale_bits" not in given:  # when all scales had 16
            object.__setattr__(self, "scale_bits", 16)
        self._check_kinds()
        self._check_bits()
        self._check_numbers()
        self._check_budget()
        self._check_together()
        self._check_codec()

    def _take_old_names(self, named: dict[str, Any]) -> None:
        """Values by a field's new name that came under its old one, and the old name of a codec."""
        codecs = {name: "whitened" for name in ("key_codec", "value_codec") if getattr(self, name) == "visible"}
        for name, value in ({n: v for n, v in named.items() if v is not None} | codecs).items():
            object.__setattr__(self, name, value)

    def _leave_bits(self, given: set[str]) -> None:
        """Let ``cache_bytes`` choose the bits; ValueError where they are given too.

        A config of before is taken as it is: ``k_bits`` and ``v_bits`` 2, ``mean_bits`` None."""
        if given and (self.k_bits, self.v_bits, self.mean_bits) != (2, 2, None):
            raise ValueError(
                f"cache_bytes chooses the bits of keys and values, and {', '.join(sorted(given))} would too; leave one "
                "of them out"
            )
        object.__setattr__(self, "mean_bits", None)

    def _check_budget(self) -> None:
        """Raise ValueError on a budget that is no size, or does not say for how many tokens it is."""
        if self.cache_bytes is None:
            if self.batch_size is not None:
                raise ValueError("batch_size says for how many sequences cache_bytes is; give cache_bytes too")
            return
        try:
            object.__setattr__(self, "cache_bytes", byte_size(self.cache_bytes))
        except ValueError as error:
            raise ValueError(f"cache_bytes {error}") from None
        if self.context_length is None:
            raise ValueError("cache_bytes needs context_length: the tokens that each sequence is to have room for")

    def _check_kinds(self) -> None:
        """Raise ValueError on a value that is none of a field's choices."""
        for name, choice in {"key_codec": CodecName, "value_codec": CodecName, "basis": Basis, "adapt": Adapt}.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(choice):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choice)))}, got {value!r}")
        switches = ("k_zero_point", "v_zero_point", "rotation", "subtract_key_mean", "unbiased_scale", "error_feedback")
        for name in switches:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.check_finite is not None and not isinstance(self.check_finite, bool):
            raise ValueError(f"check_finite must be True, False or None, got {self.check_finite!r}")
        if not _whole(self.version, range(1, CONFIG_VERSION + 1)):
            raise ValueError(f"version must be 1 to {CONFIG_VERSION}, which this headq_ao reads, got {self.version!r}")
        if self.calibration is not None and not isinstance(self.calibration, (CalibrationLike, str)):
            raise ValueError(
                f"calibration must be a Calibration, the path of a saved one, or None, got {type(self.calibration)}"
            )

    def _check_bits(self) -> None:
        """Raise ValueError on bits that cannot be stored, in blocks of that size."""
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if bits is not None and not _whole(bits, PIECES):
                raise ValueError(f"{name} must be 1, 2, 3, 4, 5, 6 or 8, or None (exact), got {bits!r}")
        if self.k_bits is None and self.v_bits is None:
            raise ValueError("k_bits and v_bits are both None: nothing would be packed; give at least one of them")
        if not _whole(self.block_size, BLOCKS):
            raise ValueError(f"block_size must be 16, 32, 64 or 128, got {self.block_size!r}")
        if self.v_bits is not None:
            tile = max(granule(w) for w in PIECES[self.v_bits])
            if self.block_size % tile:
                raise ValueError(
                    f"block_size must be a multiple of {tile} with v_bits={self.v_bits}, got {self.block_size}"
                )
        if not _whole(self.scale_bits, SCALE_BITS):
            raise ValueError(f"scale_bits must be 8 or 16, got {self.scale_bits!r}")
        if not _whole(self.side_bits, PIECES):
            raise ValueError(f"side_bits must be 1, 2, 3, 4, 5, 6 or 8, got {self.side_bits!r}; rank=0 for none")
        if self.mean_bits is None:
            return
        packed = {"keys": self.k_bits, "values": self.v_bits}
        levels = {name: self.levels(name[0]) for name, bits in packed.items() if bits is not None}
        least, most = (sum(of(x) for x in levels.values()) / len(levels) for of in (min, max))
        if not _number(self.mean_bits, least, most):
            raise ValueError(
                f"mean_bits must be a number from {least:g} to {most:g}, which {' and '.join(levels)} can have "
                f"with block_size={self.block_size}, or None, got {self.mean_bits!r}"
            )
        object.__setattr__(self, "mean_bits", float(self.mean_bits))

    def _check_numbers(self) -> None:
        """Raise ValueError on a number out of range."""
        if not _whole(self.sign, (1, -1)):
            raise ValueError(f"sign must be 1 or -1, got {self.sign!r}")
        for name, least, most in (
            ("n_sink", 0, MOST),
            ("residual_length", 1, MOST),
            ("prior_tokens", 0, MOST),
            ("rank", 0, MOST),
            ("warmup_tokens", 1, MOST),
            ("v_group_size", 1, MOST),
            ("context_length", 1, MOST),
            ("batch_size", 1, MOST),
            ("seed", 0, MOST_SEED),
        ):
            value, optional = getattr(self, name), name in OPTIONAL
            if optional and value is None:
                continue
            if not _whole(value) or value < least:
                or_none = " or None" if optional else ""
                raise ValueError(f"{name} must be a whole number of at least {least}{or_none}, got {value!r}")
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        if not _number(self.whitening, 0, 1):
            raise ValueError(f"whitening must be a number from 0 to 1, got {self.whitening!r}")
        object.__setattr__(self, "whitening", float(self.whitening))
        if self.value_weight is not None and not _number(self.value_weight, 0, MOST):
            raise ValueError(f"value_weight must be a number from 0 to {MOST}, or None, got {self.value_weight!r}")

    def _check_together(self) -> None:
        """Raise ValueError on options that do not fit each other."""
        if self.k_zero_point and self.k_bits is not None and self.key_codec == "whitened":
            raise ValueError("k_zero_point=True needs key_codec='affine': whitened keys stand around their mean")
        if (self.v_zero_point or self.v_group_size is not None) and self.v_bits and self.value_codec == "whitened":
            raise ValueError(
                "v_zero_point and v_group_size need value_codec='affine': whitened values have one scale a token"
            )
        if not self.has_side_code and (self.sign != 1 or self.basis != "query_pca"):
            raise ValueError(
                f"sign={self.sign} and basis={self.basis!r} shape the side code, and there is none: give rank (16, say)"
            )

    def _check_codec(self) -> None:
        """Raise ValueError on options of another codec that do not fit."""
        if self.codec is not None and (not isinstance(self.codec, str) or not self.codec):
            raise ValueError(f"codec must be the name of a registered codec, or None, got {self.codec!r}")
        options = self.codec_options
        if options is not None:
            if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
                raise ValueError(f"codec_options must be a dict of the codec's options by name, got {options!r}")
            object.__setattr__(
                self, "codec_options", Options({n: _plain(value) for n, value in options.items()}) or None
            )
        if self.codec is None and options:
            raise ValueError("codec_options are those of a registered codec, and codec is None")
        wrong = [f.name for f in dataclasses.fields(self) if f.name in OF_HEADQ and getattr(self, f.name) != f.default]
        if self.codec is not None and wrong:
            raise ValueError(
                f"{', '.join(wrong)} shape HeadQ's own codec, and codec={self.codec!r} takes its place; give that "
                "codec's options in codec_options"
            )

    def levels(self, side: str) -> list[int]:
        """Bits that a head's keys (``"k"``) or values (``"v"``) may have with this block size, in rising order."""
        return [b for b, widths in PIECES.items() if side == "k" or not self.block_size % max(map(granule, widths))]

    def byte_scales(self, side: str) -> bool:
        """Whether scales of keys (``"k"``) or of calibrated values (``"v"``) may be in a byte."""
        whitened = (self.key_codec if side == "k" else self.value_codec) == "whitened"
        return self.scale_bits == 8 and whitened and self.error_feedback

    @property
    def row_bits(self) -> int:
        """Bits of a row that is key and value."""
        assert self.k_bits is not None and self.v_bits is not None
        return max(self.k_bits, self.v_bits)

    @property
    def readout_weight(self) -> float:
        """:attr:`value_weight`, with the default resolved."""
        return 1.0 if self.value_weight is None else float(self.value_weight)

    @property
    def one_row(self) -> bool:
        """Whether keys that are values can be stored as one row: whitened, both sides coded, without a side code or a
        key mean of each sequence."""
        whitened = self.key_codec == self.value_codec == "whitened" and not self.has_side_code
        coded = self.k_bits is not None and self.v_bits is not None
        return whitened and coded and self.codec is None and self.adapt == "off"

    @property
    def has_side_code(self) -> bool:
        """Whether keys carry a side code: by default affine ones do."""
        return self.key_codec == "affine" if self.rank is None else self.rank > 0

    def side_rank(self, head_dim: int) -> int:
        """R, with the default resolved: whole 16-coordinate granules, so that no stored bit is padding."""
        if not self.has_side_code:
            return 0
        return max(16, head_dim // 4 // 16 * 16) if self.rank is None else self.rank

    def key_bits(self, head_dim: int) -> tuple[int, ...]:
        """Bits of each stored key coordinate: base first, then the side code."""
        assert self.k_bits is not None
        return (self.k_bits,) * head_dim + (self.side_bits,) * self.side_rank(head_dim)

    def warmup(self, head_dim: int) -> int:
        """Body tokens, in whole blocks, that a sequence's own statistics are taken from."""
        tokens = max(256, 4 * head_dim) if self.warmup_tokens is None else self.warmup_tokens
        return math.ceil(tokens / self.block_size) * self.block_size

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError where this config cannot store heads of that size."""
        if head_dim % 16 or head_dim > WIDEST_HEAD:
            raise ValueError(f"head_dim must be a multiple of 16 up to {WIDEST_HEAD}, got {head_dim}")
        if self.v_group_size is not None and head_dim % self.v_group_size:
            raise ValueError(f"v_group_size must divide head_dim {head_dim}, got {self.v_group_size}")
        if self.rank is not None and self.rank > head_dim:
            raise ValueError(f"rank must be at most head_dim {head_dim}, got {self.rank}")


_KINDS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((bool, np.bool_), bool),
    ((int, np.integer), int),
    ((float, np.floating), float),
    (str, str.__str__),
    (os.PathLike, os.fspath),
)


def _plain(value: Any) -> Any:
    """numpy's numbers, subclasses of Python's and paths as what JSON has; anything else as it is."""
    return next((make(value) for kinds, make in _KINDS if isinstance(value, kinds)), value)


def _whole(value: Any, among: Container[int] | None = None) -> bool:
    """A plain int (True and 2.0 are none), and one of those."""
    return isinstance(value, int) and not isinstance(value, bool) and (among is None or value in among)


def _number(value: Any, least: float, most: float) -> bool:
    """A plain int or float in that range; nan is in none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def headq_config(preset: str | None = None, **options: Any) -> HeadQConfig:
    """Build a :class:`HeadQConfig`; ``options`` are its fields and override the preset's.

    Args:
        preset: ``"balanced"``, the default (2.375 code bits, 2.5 with the scales at a head_dim of 64), ``"quality"``
            (2.875, 3.0) or ``"near_lossless"`` (4.0625, 4.25): mean bits shared between heads and sides by the
            calibration; without one 2, 2.5 or 4 bits in every layer. Below the default there are ``"compact"``
            (1.875, 2.0) and ``"minimal"`` (1.375, 1.5), which cost quality and want a calibration: without one
            they are 2 bits, and 2 for keys and 1 for values. ``"headq_paper"``: the published construction, an
            affine 2-bit base and a query-PCA side code of its error (HeadQ, arXiv 2605.03562, withdrawn by its author).
        **options: fields of :class:`HeadQConfig`. With ``k_bits``, ``v_bits`` or a codec, all layers have the same
            bits, unless ``mean_bits`` is given too. ``cache_bytes`` and ``context_length`` take the place of a preset.

    Raises:
        ValueError: on an unknown preset or option (the message lists the valid ones), a value out of range, or
            ``cache_bytes`` beside a preset or bits.

    Example:
        >>> from headq_ao import headq_config
        >>> headq_config().mean_bits, headq_config(k_bits=3, v_bits=None).mean_bits
        (2.375, None)
        >>> headq_config(preset="headq_paper").rank
        8
    """
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f"preset must be one of {sorted(PRESETS)} or None, got {preset!r}")
    names = [f.name for f in dataclasses.fields(HeadQConfig)]
    unknown = sorted(set(options) - {*names, *OLD_NAMES})
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}; valid options are {', '.join(names)}")
    if options.get("cache_bytes") is not None:
        if preset is not None:
            raise ValueError(f"cache_bytes chooses the bits, and preset={preset!r} would too; leave one of them out")
        return HeadQConfig(**options)
    chosen = dict(PRESETS[DEFAULT if preset is None else preset])
    if options.keys() & set(UNIFORM_ONLY):
        chosen.pop("mean_bits", None)
    return HeadQConfig(**chosen | options)
