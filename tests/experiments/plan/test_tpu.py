"""The paper's UltraFeedback searches and fits, compiled for TPUs that are not there.

Four layers of every network; all other shapes are the experiment's. A command compiles all layers:
`python -m experiments.plan`.
"""

import pytest

from tests.experiments.plan.tpu_programs import CASES, LAYERS, PROMPTS
from tests.libtpu import compiled_by

pytestmark = pytest.mark.slow

# Widths: of the policy, of the value networks.
WIDTHS = {"70b": (8192, 4096), "8b": (4096, 4096)}
KV_HEADS, HEAD, BEAMS, CANDIDATES, CHUNK, TOKENS = 8, 128, 4, 16, 16, 2048
SEARCHES = ("prefill", "beam step: sampling", "beam step: values and selection")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """What `tpu_programs` prints."""
    return request.param, compiled_by("tests.experiments.plan.tpu_programs", request.param)


def test_weights_are_those_of_the_parameters(case):
    variant, facts = case
    model = facts["mesh"]["model"]
    for count, width, copies, name in zip(
        facts["parameters"],
        WIDTHS[variant],
        (1, 3),
        ("weights of the policy", "weights of the value functions"),
        strict=True,
    ):
        # Norms, and the head of a value function, are on every device.
        everywhere = (2 * LAYERS + 1) * width + (width if copies == 3 else 0)
        expected = 2 * ((count - everywhere) / model + everywhere)
        assert facts["held"][name] == pytest.approx(copies * expected, abs=64)


def test_caches_are_those_of_the_formula(case):
    _, facts = case
    mesh = facts["mesh"]
    prompts = PROMPTS / (mesh["data"] * mesh["fsdp"])
    slot = 2 * 2 * LAYERS * KV_HEADS * HEAD / mesh["model"]
    steps, slots = TOKENS // CHUNK, facts["value_slots"]
    assert slots == 2 * CHUNK  # a bridge's
    # The last token of a policy's chunk is read into the beam that it is kept for.
    for owner, copies, chunk, apart in (
        ("policy", 1, CHUNK, CHUNK - 1),
        ("values", 3, slots, slots),
    ):
        by_hand = {
            "prompt": facts["prompt_tokens"],
            "beams": BEAMS * steps * chunk,
            "chunk": CANDIDATES * apart,
        }
        for part, number in by_hand.items():
            found = facts["held"][f"{owner}: {part} cache"]
            keys = copies * prompts * number * slot
            # Beside keys and values: positions and lengths of four bytes.
            assert keys < found < 1.01 * keys + 4096, (owner, part)


def test_the_compiler_plans_for_what_was_counted(case):
    _, facts = case
    held = facts["held"]
    caches = sum(size for name, size in held.items() if "cache" in name)
    sampling = facts["arguments"]["beam step: sampling"]
    assert sampling == pytest.approx(held["weights of the policy"] + caches, rel=0.02)
    # Prompts' caches come out of their program as they go into the next.
    assert facts["outputs"]["prefill"] == pytest.approx(caches, rel=0.02)
    assert facts["outputs"]["beam step: sampling"] < 0.02 * caches


def test_nothing_whole_is_gathered_while_searching(case):
    _, facts = case
    limit = min(facts["whole"].values())
    gathers = [
        (name, size)
        for name, kind, size, *_ in facts["collectives"]
        if name in SEARCHES and kind == "all-gather"
    ]
    assert gathers, "tops of the vocabulary's parts are gathered"
    assert max(size for _, size in gathers) < 0.1 * limit


def test_a_search_sends_nothing_but_flags_along_data(case):
    _, facts = case
    along = [
        size
        for name, _, size, axes, _ in facts["collectives"]
        if name in SEARCHES and {"data", "fsdp"} & set(axes)
    ]
    assert sum(along) < 1024


def test_a_search_fits(case):
    """With four layers; with all of them only the planner can say."""
    _, facts = case
    for name in SEARCHES:
        assert 0 < facts["needs"][name] < facts["memory"], name
