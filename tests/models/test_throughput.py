"""Tokens a second and shares of the peak."""

import pytest

from iro_jax.models import throughput
from iro_jax.models.throughput import Peak, Throughput, Work


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_peaks_of_known_devices(kind, flops):
    peak = throughput._of_device(kind, "accelerator")
    assert peak.flops == flops
    assert peak.source == f"{kind}, data sheet, dense bf16"


def test_the_peak_of_a_processor_is_measured():
    peak = throughput.peak()
    assert 1e9 < peak.flops < 1e14
    assert "measured" in str(peak)
    assert throughput.peak() is peak


def test_numbers_of_some_work():
    work = Work(1000, 1500, 1e12) + Work(2000, 2500, 2e12)
    found = Throughput(work, 2.0, Peak(1e13, "data sheet"))
    assert found.numbers() == {
        "tokens_per_second": 1500.0,
        "share_of_slots": 0.75,
        "share_of_peak": pytest.approx(0.15),
    }
    assert str(found) == "1,500 tokens/s, 75% of slots real, 15.0% of peak"
