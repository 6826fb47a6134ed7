"""Warnings point to the user's line."""

import warnings

import torch

from headq_ao import calibrate, headq_config, quantize_
from headq_ao.user_warning import warn
from tests import older_transformers


def test_warnings_point_to_the_users_line(tiny, token_ids):
    """Not to a line of the library that was called in between."""
    model = tiny()

    def live(model):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model.generate(token_ids(1, 20), max_new_tokens=2)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        few = calibrate(model, [token_ids(1, 40)], progress=False)
        quantize_(model, headq_config(calibration=few))
        model(token_ids(1, 20), use_cache=False)
        live(model)
    ours = [w for w in seen if str(w.message).startswith("HeadQ: ")]
    assert len(ours) == 4
    assert {w.filename for w in ours} - {older_transformers.__file__} == {__file__}


def code_of(module, text):
    """``run(warn)`` of that text, in a module of that name and a file of the same."""
    space = {"__name__": module}
    exec(compile(text, f"{module}.py", "exec"), space)
    return space["run"]


def test_modules_in_between_are_passed_by():
    """Ours and those of libraries that call us, whatever the order; never another one."""
    inner = code_of("headq_ao.made", "def run(warn): warn('HeadQ: told')")
    middle = code_of("transformers.made", "def run(warn, inner): inner(warn)")
    user = code_of("theirs", "\n\ndef run(warn, middle, inner): middle(warn, inner)")
    outer = code_of("torch.made", "def run(user, *rest): user(*rest)")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        outer(user, warn, middle, inner)
    (told,) = seen
    assert (told.filename, told.lineno, told.category) == ("theirs.py", 3, UserWarning)


def test_the_same_words_once_for_a_line_unless_they_are_wanted_again():
    run = code_of("theirs", "def run(warn, **options):\n    for _ in range(3): warn('HeadQ: told', **options)")
    for options, times in (({}, 1), ({"again": True}, 3)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            run(warn, **options)
        assert len(seen) == times
