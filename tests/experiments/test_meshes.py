"""A run on eight devices ends where one on one device ends, in every way of splitting networks."""

import numpy as np
import pytest

from experiments import run
from experiments.devices import devices_of
from iro_jax.data import RolloutStore
from iro_jax.models.sharding import REPLICATED
from tests.experiments import tiny

pytestmark = pytest.mark.slow


def rollouts(folder):
    return [
        rollout
        for t in range(2)
        for rollout in RolloutStore.open(folder / f"iter_{t}/rollouts").all()
    ]


@pytest.mark.parametrize(
    ("variant", "mesh", "trainable"),
    [
        ("", {"data": 2, "fsdp": 2, "model": 2}, "all"),
        ("", {"data": 4, "model": 2, "values": "replicated"}, "head"),
        ("+bridged", {"data": 1, "model": 8}, "adapters"),
    ],
)
def test_a_run_on_a_mesh_is_the_run_on_one_device(tmp_path, variant, mesh, trainable):
    tiny.write_all(tmp_path)
    config = tiny.get_config(f"{tmp_path}{variant}")
    config.value.trainable = trainable
    config.loop.compress = False
    run.run(config, tmp_path / "one", progress=False)
    config.mesh.update(mesh)
    run.run(config, tmp_path / "mesh", progress=False)
    ours, theirs = rollouts(tmp_path / "mesh"), rollouts(tmp_path / "one")
    assert len(ours) == len(theirs) > 30
    for one, other in zip(ours, theirs, strict=True):
        assert (one.prompt.id, one.candidate) == (other.prompt.id, other.candidate)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5, rtol=2e-5)
    # A run may go on on other devices: there is nothing left to do for it.
    config.mesh.update({"data": 1, "fsdp": 1, "model": 1})
    run.run(config, tmp_path / "mesh", progress=False)


def test_what_a_mesh_cannot_be_is_told(tmp_path):
    config = tiny.get_config(str(tmp_path))
    config.mesh.data = 16
    with pytest.raises(ValueError, match="needs 16 devices"):
        devices_of(config)
    config.mesh.update(data=1, values="halved")
    with pytest.raises(ValueError, match=r"mesh\.values must be one of"):
        devices_of(config)
    config.mesh.update(data=-1, model=2, values="replicated")
    found = devices_of(config)
    assert dict(found.mesh.shape) == {"data": 4, "fsdp": 1, "model": 2}
    assert found.value_rules == REPLICATED
