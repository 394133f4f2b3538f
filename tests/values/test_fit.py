"""The trainer: what it minimises, how it goes on after a kill, and how it fails."""

import contextlib
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.values import FitError, FitSettings, fit

logging.getLogger("absl").setLevel(logging.ERROR)
WIDTH = 3
START = {"kernel": jnp.zeros(WIDTH), "bias": jnp.zeros(())}


def squared_error(params, frozen, batch):
    errors = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
    return jnp.sum(batch["weight"] * jnp.square(errors)) / jnp.sum(batch["weight"])


def linear(count, *, seed, kernel=(1.0, -2.0, 0.5), weights=None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, WIDTH)).astype(np.float32)
    y = (x @ np.asarray(kernel) + 1 + 0.3 * rng.normal(size=count)).astype(np.float32)
    weights = np.ones(count) if weights is None else weights
    return [
        {"x": x[i], "y": y[i], "weight": np.asarray(weights[i], np.float32)} for i in range(count)
    ]


TRAIN = linear(20, seed=0)
HELD_OUT = linear(7, seed=1)
SETTINGS = FitSettings(learning_rate=0.05, batch_size=8, num_epochs=4, patience=4, seed=3)
# On the way to the training data's kernel, the held-out loss falls first and then rises.
ELSEWHERE = linear(7, seed=2, kernel=(0.3, -0.6, 0.15))
OVERFITTING = FitSettings(learning_rate=0.2, batch_size=8, num_epochs=20, patience=2)


def run(folder, *, train=TRAIN, held_out=HELD_OUT, settings=SETTINGS, start=START, **options):
    return fit(squared_error, start, None, train, held_out, settings, folder=folder, **options)


def same(a, b):
    """Bit for bit."""
    equal = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(equal))


def loss_of(params, examples):
    x, y = (np.stack([e[name] for e in examples]).astype(np.float64) for name in "xy")
    return np.mean((x @ np.asarray(params["kernel"]) + float(params["bias"]) - y) ** 2)


class Killed(Exception):
    pass


def kill_after(epoch):
    def on_epoch(line):
        if line.epoch == epoch:
            raise Killed

    return on_epoch


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@contextlib.contextmanager
def full_disk(size):
    """No file may grow past `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestMinimiser:
    def test_linear_regression_comes_to_its_closed_form(self, tmp_path):
        # Every example is the whole data set, so that gradients are exact.
        together = {name: np.stack([e[name] for e in TRAIN]) for name in "xy"}
        together["weight"] = np.ones((), np.float32)

        def mean_squared_error(params, frozen, batch):
            whole = jax.tree.map(lambda x: x[0], dict(batch))
            return squared_error(params, frozen, whole | {"weight": jnp.ones(20)})

        settings = FitSettings(learning_rate=0.1, batch_size=1, num_epochs=3, warmup=0.1)
        found = fit(
            mean_squared_error, START, None, [together] * 80, [together], settings, folder=tmp_path
        )
        x = np.stack([np.append(example["x"], 1) for example in TRAIN])
        exact = np.linalg.lstsq(x, np.stack([e["y"] for e in TRAIN]), rcond=None)[0]
        np.testing.assert_allclose(found.params["kernel"], exact[:-1], atol=1e-3)
        np.testing.assert_allclose(found.params["bias"], exact[-1], atol=1e-3)

    def test_parts_that_hold_filler_alone_do_not_count(self, tmp_path):
        in_parts = FitSettings(batch_size=8, micro_batches=4, num_epochs=1)
        found = run(tmp_path, held_out=HELD_OUT[:3], settings=in_parts)
        for line, params in ((found.curve[0], START), (found.curve[1], found.params)):
            assert line.held_out_loss == pytest.approx(loss_of(params, HELD_OUT[:3]), rel=1e-5)

    def test_a_batch_in_parts_is_the_same_batch(self, tmp_path):
        weights = np.random.default_rng(0).uniform(0, 3, 20)
        train = linear(20, seed=0, weights=weights)
        whole = run(tmp_path / "1", train=train)
        settings = FitSettings(**vars(SETTINGS) | {"micro_batches": 4})
        parts = run(tmp_path / "4", train=train, settings=settings)
        for one, other in zip(whole.curve, parts.curve, strict=True):
            assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
        np.testing.assert_allclose(parts.params["kernel"], whole.params["kernel"], atol=1e-5)

    def test_losses_are_means_over_all_examples_by_weight(self, tmp_path):
        weights = np.array([1, 0, 2, 1, 1, 5, 1.0])
        held_out = linear(7, seed=1, weights=weights)
        start = run(tmp_path, held_out=held_out).curve[0]
        losses = np.stack([e["y"] for e in held_out]).astype(np.float64) ** 2
        assert (start.epoch, start.updates) == (0, 0)
        assert start.held_out_loss == pytest.approx(np.average(losses, weights=weights), rel=1e-5)

    def test_weights_are_kept_in_f32_and_the_first_ones_left_alone(self, tmp_path):
        start = {"kernel": jnp.ones(WIDTH, jnp.bfloat16), "bias": jnp.zeros(())}
        found = run(tmp_path, start=start)
        assert found.params["kernel"].dtype == jnp.float32
        assert not np.array_equal(found.params["kernel"], found.params["kernel"].astype("bfloat16"))
        assert start["kernel"].tolist() == [1.0] * WIDTH

    def test_the_best_weights_are_kept_and_a_fit_that_gets_worse_ends(self, tmp_path):
        found = run(tmp_path, held_out=ELSEWHERE, settings=OVERFITTING)
        losses = [line.held_out_loss for line in found.curve]
        assert 0 < found.best_epoch < 17
        assert found.best_epoch == int(np.argmin(losses))
        assert len(found.curve) == found.best_epoch + OVERFITTING.patience + 1
        assert [line.updates for line in found.curve] == [2 * e for e in range(len(losses))]
        assert loss_of(found.params, ELSEWHERE) == pytest.approx(min(losses), rel=1e-4)

    def test_fewer_examples_than_a_batch(self, tmp_path):
        found = run(tmp_path, train=TRAIN[:3])
        assert found.curve[-1].updates == SETTINGS.num_epochs
        assert found.curve[-1].train_loss < found.curve[1].train_loss


class TestContinuation:
    @pytest.mark.parametrize("epoch", [0, 2, 4])
    def test_an_interrupted_fit_ends_like_one_that_was_not(self, epoch, tmp_path):
        whole = run(tmp_path / "whole")
        with pytest.raises(Killed):
            run(tmp_path / "killed", on_epoch=kill_after(epoch))
        told = []
        again = run(tmp_path / "killed", on_epoch=told.append)
        assert again.curve == whole.curve == tuple(told)
        assert again.best_epoch == whole.best_epoch
        assert same(again.params, whole.params)

    def test_the_best_weights_survive_as_well(self, tmp_path):
        arguments = {"held_out": ELSEWHERE, "settings": OVERFITTING}
        whole = run(tmp_path / "whole", **arguments)
        with pytest.raises(Killed):
            run(tmp_path / "killed", on_epoch=kill_after(whole.best_epoch + 1), **arguments)
        again = run(tmp_path / "killed", **arguments)
        assert (again.curve, again.best_epoch) == (whole.curve, whole.best_epoch)
        assert same(again.params, whole.params)

    @pytest.mark.slow
    def test_a_process_killed_while_it_writes(self, tmp_path):
        child = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from {__name__} import die; die({str(tmp_path / 'killed')!r})",
            ],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
        whole, again = run(tmp_path / "whole"), run(tmp_path / "killed")
        assert again.curve == whole.curve
        assert same(again.params, whole.params)

    def test_a_fit_that_has_ended_is_only_read(self, tmp_path):
        found = run(tmp_path)
        before = contents(tmp_path)

        def never(params, frozen, batch):
            raise AssertionError("evaluated again")

        again = fit(never, START, None, TRAIN, HELD_OUT, SETTINGS, folder=tmp_path)
        assert again.curve == found.curve
        assert same(again.params, found.params)
        assert contents(tmp_path) == before


def die(folder):
    """Is killed as soon as it has begun to write the third checkpoint."""

    def on_epoch(line):
        if line.epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(folder), on_epoch=on_epoch)


class TestErrors:
    def test_a_loss_that_is_not_finite_names_the_update_and_leaves_checkpoints(self, tmp_path):
        whole = run(tmp_path / "whole")
        with pytest.raises(Killed):
            run(tmp_path / "nan", on_epoch=kill_after(2))
        broken = [example | {"y": np.float32(np.nan)} for example in TRAIN]
        with pytest.raises(FitError, match=rf"Update 5: .*{tmp_path}/nan.*Got: loss=nan"):
            run(tmp_path / "nan", train=broken)
        again = run(tmp_path / "nan")
        assert again.curve == whole.curve
        assert same(again.params, whole.params)

    def test_a_gradient_that_is_not_finite(self, tmp_path):
        def objective(params, frozen, batch):
            return squared_error(params, frozen, batch) + jnp.sum(jnp.sqrt(params["kernel"]))

        with pytest.raises(
            FitError, match=r"Update 1: .*Got: loss=[\d.]+, gradient norm=(inf|nan)"
        ):
            fit(objective, START, None, TRAIN, HELD_OUT, SETTINGS, folder=tmp_path)

    def test_a_held_out_loss_that_is_not_finite(self, tmp_path):
        broken = [*HELD_OUT[:-1], HELD_OUT[-1] | {"y": np.float32(np.inf)}]
        with pytest.raises(FitError, match=r"Update 0: .*Got: held-out loss=inf"):
            run(tmp_path, held_out=broken)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_full_disk_loses_no_checkpoint(self, tmp_path):
        start = {"kernel": jnp.zeros(WIDTH), "bias": jnp.zeros(()), "ballast": noise(2**15)}
        whole = run(tmp_path / "whole", start=start)
        with full_disk(2**16) as fill:

            def on_epoch(line):
                if line.epoch == 2:
                    wait_for(tmp_path / "full" / "2")
                    fill()

            message = rf"{tmp_path}/full: a checkpoint could not be written.*File too large"
            with pytest.raises(FitError, match=message):
                run(tmp_path / "full", start=start, on_epoch=on_epoch)
        gc.collect()  # what Orbax leaves behind complains here, not in another test
        assert {"1", "2"} <= {path.name for path in (tmp_path / "full").iterdir()}
        again = run(tmp_path / "full", start=start)
        assert again.curve == whole.curve
        assert same(again.params, whole.params)

    @pytest.mark.parametrize("part", ["train", "held_out"])
    def test_nothing_to_fit_to(self, part, tmp_path):
        with pytest.raises(ValueError, match=r"training and held-out examples. Got: "):
            run(tmp_path / "new", **{part: []})
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        "wrong",
        [
            {"batch_size": 0},
            {"batch_size": 8, "micro_batches": 3},
            {"learning_rate": float("nan")},
            {"warmup": 1.0},
            {"clip_norm": 0.0},
            {"patience": 0},
        ],
    )
    def test_settings_that_make_no_sense(self, wrong):
        with pytest.raises(ValueError, match=f"{next(reversed(wrong))}.*Got: "):
            FitSettings(**wrong)


def wait_for(path):
    """Until what is written behind our back has its name."""
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def noise(count):
    """Weights that do not compress, so that a checkpoint has a size."""
    return jax.random.normal(jax.random.key(0), (count,))
