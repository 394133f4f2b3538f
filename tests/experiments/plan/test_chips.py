"""The table of chips, and what `--topology` may say."""

import pytest

from experiments.plan.chips import CHIPS, chip_of, parse_topology
from iro_jax.models import throughput

KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "l4": "NVIDIA L4",
}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_library_measures_itself_against_the_same_peak(chip):
    assert chip_of(KINDS[chip.name]) == chip
    assert throughput._of_device(KINDS[chip.name], "any").flops == chip.flops


def test_unknown_kinds_have_no_chip():
    assert chip_of("cpu") is None


def test_a_topology_is_a_slice_or_gpus():
    assert parse_topology("v5p:2x2x4").num_devices == 16
    assert parse_topology("v5e:2x4").chip.memory == pytest.approx(16.9e9, rel=0.01)
    eight = parse_topology("gpu:h100x8")
    assert (eight.num_devices, eight.chip.name, eight.is_tpu) == (8, "h100", False)
    assert parse_topology("gpu:l4").num_devices == 1


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5p:2x2x4", 4), ("v5e:2x4", 8), ("v5e:4x4", 4), ("v4:2x2x2", 8), ("gpu:h100x16", 8)],
)
def test_devices_of_a_host(name, devices):
    assert parse_topology(name).host_devices == devices


def test_libtpu_plans_for_two_devices_on_a_v4_chip():
    found = parse_topology("v4:2x2x1")
    assert found.num_devices == 8
    assert 2 * found.chip.bandwidth == chip_of("TPU v4").bandwidth


@pytest.mark.parametrize("name", ["v5p", "v9:2x2", "gpu:v5p", "h100x8", "gpu:h100x", "h100:2x2"])
def test_anything_else_is_refused(name):
    with pytest.raises(ValueError, match=r"such as v5p:2x2x4 .* Got: "):
        parse_topology(name)
