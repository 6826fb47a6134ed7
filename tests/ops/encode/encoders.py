"""Encoders of a case, and what they make of its tokens, for tests."""

from headq_ao.ops import Encoder, quantize


def encoder_of(args, **options):
    """The Encoder of those arguments."""
    given = {name: x for name, x in (args | options).items() if name not in ("k", "symmetric", "metric")}
    given["bits"] = tuple(given["bits"])
    given["step"] = given["step"] if args["symmetric"] else None
    return Encoder(**given, hessian=args.get("metric"))


def run(args, **options):
    """Codes, scale and zero of quantize."""
    codes, scale, zero = quantize(args["k"], encoder_of(args, **options))
    return codes, scale[..., 0], None if zero is None else zero[..., 0]
