"""A fit on a mesh is the fit of one device, and can go on on another mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from iro_jax.models import make_mesh
from iro_jax.values import FitSettings, Head, ValueFitter, ValueSettings, new_head
from iro_jax.values.placement import Placement
from tests.values import cases

ROLLOUTS = cases.rollouts()
FIT = FitSettings(learning_rate=0.01, batch_size=8, num_epochs=3, micro_batches=2)
ALL = ValueSettings(trainable="all", head=None, fit=FIT)
ADAPTERS = dataclasses.replace(ALL, trainable="adapters", rank=2)
MESHES = [(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8), (2, 2, 2), (1, 8, 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return cases.store(tmp_path_factory.mktemp("rollouts"), ROLLOUTS)


START = new_head(cases.model(), Head())


class KilledError(Exception):
    pass


def fitted(settings, store, folder, mesh=None, killed_after=None):
    def on_epoch(line):
        if line.epoch == killed_after:
            raise KilledError

    return ValueFitter(settings, cases.answer_tokens(), mesh=mesh)(
        START,
        [store],
        ROLLOUTS[:12],
        ROLLOUTS[12:],
        folder=folder,
        on_epoch=on_epoch,
    )


def mesh_of(shape):
    data, fsdp, model = shape
    return make_mesh(data, model, fsdp=fsdp)


def assert_same(found, expected):
    assert found.best_epoch == expected.best_epoch
    for line, other in zip(found.curve, expected.curve, strict=True):
        assert line.train_loss == pytest.approx(other.train_loss, abs=1e-4)
        assert line.held_out_loss == pytest.approx(other.held_out_loss, abs=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
        found.function.params,
        expected.function.params,
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ALL, ADAPTERS], ids=["all", "adapters"])
def test_the_curve_does_not_depend_on_the_mesh(settings, store, tmp_path):
    expected = fitted(settings, store, tmp_path / "one")
    assert expected.curve[-1].held_out_loss < 0.9 * expected.curve[0].held_out_loss
    for shape in MESHES if settings is ALL else MESHES[4:5]:
        found = fitted(settings, store, tmp_path / str(shape), mesh_of(shape))
        assert_same(found, expected)


@pytest.mark.slow
def test_a_fit_goes_on_on_another_mesh(store, tmp_path):
    expected = fitted(ALL, store, tmp_path / "whole")
    with pytest.raises(KilledError):
        fitted(ALL, store, tmp_path / "moved", mesh_of((4, 1, 2)), killed_after=2)
    found = fitted(ALL, store, tmp_path / "moved", mesh_of((1, 4, 2)))
    assert_same(found, expected)
    with pytest.raises(KilledError):
        fitted(ALL, store, tmp_path / "shrunk", mesh_of((2, 2, 2)), killed_after=1)
    assert_same(fitted(ALL, store, tmp_path / "shrunk"), expected)


def test_training_splits_what_it_trains_over_fsdp():
    params = Placement(mesh_of((1, 4, 2))).put(START.params.backbone)
    kernel = params["layers"][0]["mlp"]["up"]["kernel"].get_value()
    embed, branches, hidden = kernel.shape
    assert kernel.sharding.shard_shape(kernel.shape) == (embed // 4, branches, hidden // 2)


def test_moments_lie_beside_their_parameters():
    places = Placement(mesh_of((1, 4, 2)))
    params = places.put(START.params.backbone)
    state = places.init(FIT.optimizer(10).init, params)
    shapes = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state)]
    for x in jax.tree.leaves(params):
        assert shapes.count(x.sharding.shard_shape(x.shape)) >= 2
