"""Serving with vLLM: an attention backend whose pages hold HeadQ's packed tokens.

vLLM finds :func:`register` by its entry point ``vllm.general_plugins`` and calls it in each of its processes. The
backend is turned on by ``--attention-backend CUSTOM`` and a calibration, see
:mod:`headq_ao.integrations.vllm.settings`.
"""


def register() -> None:
    """Make the backend known to vLLM; nothing else changes until it is chosen."""
    from headq_ao.integrations.vllm import hooks

    hooks.install()
