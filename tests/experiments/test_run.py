"""The command, on a run in seconds: what it leaves behind, and how it refuses."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import run as command
from experiments.settings import loop_settings, search_settings
from iro_jax import files, values
from iro_jax.collect import Collector, Guidance
from iro_jax.data import Prompt, PromptError, RolloutError, RolloutStore
from iro_jax.evaluation import Ledger
from iro_jax.models import from_pretrained
from iro_jax.rewards import CallableReward
from iro_jax.values import FitError
from iro_jax.workdir import Workdir, WorkdirError
from tests.experiments import tiny

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended: its inputs, its folder, and what it returned."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.write_all(root)
    results = command.run_seed(tiny.get_config(str(root)), root / "run", progress=False)
    return root, root / "run", results


def test_the_folder_has_what_the_design_promises(finished):
    _, folder, results = finished
    for name in (
        "config.json",
        "manifest.json",
        "cost.jsonl",
        "iter_0/rollouts/manifest.json",
        "iter_1/value/export/value.json",
        "compressed/export/value_head.safetensors",
        "eval/base/outputs.jsonl",
        "eval/iro_2/metrics.json",
        "report/methods.md",
        "report/health.md",
    ):
        assert (folder / name).exists(), name
    assert list((folder / "tensorboard").iterdir())
    assert [r.name for r in results][:4] == ["base", "best_of_4", "guided_sample_1", "iro_1"]


def test_picks_follow_from_the_stored_answers(finished):
    """The reward picks the best finalist, the values the first; base is the candidates' mean."""
    _, folder, results = finished
    of_each = {result.name: result for result in results}
    for search, sample, picked in (
        ("unguided", None, "best_of_4"),
        ("iteration_2", "guided_sample_2", "iro_2"),
    ):
        rewards: dict[str, list[float]] = {}
        scores: dict[str, list[float]] = {}
        for rollout in RolloutStore.open(folder / "eval" / "searches" / search).all():
            assert rollout.reward == pytest.approx(tiny.reward("", rollout.text))
            rewards.setdefault(rollout.prompt.id, []).append(rollout.reward)
            scores.setdefault(rollout.prompt.id, []).append(rollout.score)
        np.testing.assert_allclose(of_each[picked].reward, [max(x) for x in rewards.values()])
        if sample is None:
            means = [np.mean(x) for x in rewards.values()]
            np.testing.assert_allclose(of_each["base"].reward, means, rtol=1e-6)
        else:
            first = [x[int(np.argmax(scores[name]))] for name, x in rewards.items()]
            np.testing.assert_allclose(of_each[sample].reward, first)


def test_iterations_have_prompts_of_their_own(finished):
    _, folder, _ = finished
    used = [
        {r.prompt.id for r in RolloutStore.open(folder / f"iter_{t}" / "rollouts").all()}
        for t in range(2)
    ]
    assert [len(ids) for ids in used] == [8, 8]
    assert not used[0] & used[1]


def test_costs_are_counted_once_and_apart(finished):
    """Tokens as the stores have them sampled; training and inference separately."""
    _, folder, _ = finished
    ledger = Ledger(folder / "cost.jsonl")
    # Unguided candidates are all kept, so that the store holds every sampled token.
    store = RolloutStore.open(folder / "iter_0" / "rollouts")
    sampled = sum(len(rollout.tokens) for rollout in store.all())
    assert ledger.totals(stage="iter_0/rollouts").tokens_sampled == sampled
    assert ledger.totals(stage="iter_0/rollouts").reward_queries == len(store)
    assert ledger.totals(stage="iter_0/rollouts").value_queries == 0
    one, two = (ledger.totals(stage=f"eval/iteration_{t}") for t in (1, 2))
    # Table 1: U * H / L * I for each prompt at most, less where answers end early.
    at_most = 6 * 4 * (6 // 2)
    assert at_most / 2 < one.value_queries <= at_most
    assert at_most < two.value_queries <= 2 * at_most
    assert two.value_queries % 2 == 0
    assert ledger.totals().tokens_sampled == sum(
        ledger.totals(phase=phase).tokens_sampled for phase in ("training", "inference")
    )


def test_rows_fit_alpaca_eval(finished):
    _, folder, _ = finished
    rows = (folder / "eval" / "iro_2" / "outputs.jsonl").read_text().splitlines()
    assert len(rows) == 6
    for row in map(json.loads, rows):
        assert row["generator"] == "iro_2"
        assert row["instruction"].endswith("w1")
        assert isinstance(row["output"], str)


def test_the_same_command_again_finds_everything_done(finished):
    root, folder, results = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("**/*.arrayrecord")}
    again = command.run_seed(tiny.get_config(str(root)), folder, progress=False)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("**/*.arrayrecord")} == before
    for a, b in zip(results, again, strict=True):
        np.testing.assert_array_equal(a.reward, b.reward)


def test_another_configuration_is_refused_by_field(finished):
    root, folder, _ = finished
    config = tiny.get_config(str(root))
    config.search.chunk_length = 3
    with pytest.raises(WorkdirError, match=r"search\.chunk_length \(was 2, is 3\)"):
        command.run_seed(config, folder, progress=False)


def test_mistakes_are_told_before_any_work_and_can_be_put_right(finished, tmp_path):
    root, _, _ = finished
    folder, evaluation = tmp_path / "run", tmp_path / "long.jsonl"
    evaluation.write_text(json.dumps({"id": "long", "prompt": "w1 " * 200}) + "\n")

    def loss(config):
        config.value.loss = "verifiable"

    def prompt(config):
        config.task.evaluation.source = str(evaluation)

    def split(config):
        config.eval.split = "validation"

    for spoil, message in (
        (loss, "loss='verifiable' needs a head with output='sigmoid'"),
        (prompt, "longer than the 122 tokens"),
        (split, "eval.split has to stay 'test'"),
    ):
        config = tiny.get_config(str(root))
        spoil(config)
        with pytest.raises(ValueError, match=message):
            command.run_seed(config, folder, progress=False)
        assert not (folder / "iter_0").exists()
    # Nothing was done with these configurations: the right one may have the folder.
    Workdir(folder, {"another": "configuration"})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(2.0, (2, 2)), ({"name": "theorem", "omega": 1.0}, (1, 2**0.5)), ([1, 2.5], (1, 2.5))],
)
def test_betas_may_be_a_number_a_list_or_the_theorems(spec, expected):
    config = tiny.get_config("")
    config.loop.betas = spec
    assert loop_settings(config).betas == pytest.approx(expected)


def test_a_prompt_that_comes_up_again_gets_other_draws(finished, tmp_path):
    root, _, _ = finished
    config = tiny.get_config(str(root))
    config.task.train.limit = 10
    config.loop.update(compress=False, num_iterations=2, betas=1.0)
    command.run_seed(config, tmp_path / "run", progress=False)
    stores = [RolloutStore.open(tmp_path / "run" / f"iter_{t}/rollouts") for t in range(2)]
    first, second = ({r.prompt.id for r in store.all()} for store in stores)
    assert len(first & second) == 6
    policy = from_pretrained(config.policy.name)
    settings = search_settings(config)
    collector = Collector(
        policy,
        CallableReward(tiny.reward),
        settings,
        config_hash="",
        ledger=Ledger(tmp_path / "cost"),
    )
    guide = collector.guide(Guidance(), chat=False)
    prompts = [Prompt("a", "w1 w2")]
    one, again, other = (
        [a.text for a in collector._search(guide, prompts, iteration, trees=0)[0].answers]
        for iteration in (0, 0, 1)
    )
    assert one == again != other


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(WorkdirError, match="must be empty or hold a run"):
        Workdir(tmp_path, {})
    assert (tmp_path / "thesis.tex").read_text() == "important"


def test_a_broken_prompt_file_is_named_with_its_line(tmp_path):
    tiny.write_all(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-3]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(PromptError, match=r"train\.jsonl, line 5"):
        command.run_seed(tiny.get_config(str(tmp_path)), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "iter_0").exists()


def test_a_damaged_shard_is_named_and_sampled_again_when_deleted(finished, tmp_path):
    root, _, results = finished
    folder = tmp_path / "run"
    config = tiny.get_config(str(root))
    config.loop.compress = False
    command.run_seed(config, folder, progress=False)
    [shard, *_] = sorted((folder / "iter_1" / "rollouts").glob("*.arrayrecord"))
    whole = shard.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    shard.write_bytes(bytes(broken))
    with pytest.raises(RolloutError, match=rf"{shard.name} is damaged; delete this file"):
        command.run_seed(config, folder, progress=False)
    shard.unlink()
    again = command.run_seed(config, folder, progress=False)
    assert shard.read_bytes() == whole
    np.testing.assert_array_equal(again[2].reward, results[2].reward)


def test_prompts_that_were_changed_under_a_run_are_noticed(finished, tmp_path):
    root, _, _ = finished
    config = tiny.get_config(str(root))
    config.loop.update(num_iterations=1, betas=1.0, compress=False)
    changed = tmp_path / "evaluation.jsonl"
    changed.write_text((root / "evaluation.jsonl").read_text())
    config.task.evaluation.source = str(changed)
    command.run_seed(config, tmp_path / "run", progress=False)
    changed.write_text(changed.read_text().replace("w1", "w2"))
    with pytest.raises(RolloutError, match="answers to another prompt of the id 'p100'"):
        command.run_seed(config, tmp_path / "run", progress=False)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_rollouts(finished, tmp_path):
    root, _, _ = finished
    config = tiny.get_config(str(root))
    config.value.fit.learning_rate = 1e30
    with pytest.raises(FitError, match=r"Update \d+: the loss and its gradient must be finite"):
        command.run_seed(config, tmp_path / "run", progress=False)
    store = RolloutStore.open(tmp_path / "run" / "iter_0" / "rollouts")
    store.verify()
    assert store.complete


def test_a_full_disk_stops_the_run_and_loses_nothing(finished, tmp_path, monkeypatch):
    """The second shard finds no space; afterwards the run goes on with the first one."""
    root, _, results = finished
    written = []
    sync = files.sync

    def full(path):
        if "arrayrecord" in str(path):
            written.append(path)
            if len(written) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    config = tiny.get_config(str(root))
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(RolloutError, match="stored there before is intact"):
            command.run_seed(config, tmp_path / "run", progress=False)
    store = RolloutStore.open(tmp_path / "run" / "iter_0" / "rollouts")
    store.verify()
    assert store.missing() == [1]
    again = command.run_seed(config, tmp_path / "run", progress=False)
    np.testing.assert_array_equal(again[-1].reward, results[-1].reward)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.search.chunk_lenght=3", 'Did you mean "chunk_length"'),
        ("--config.search.chunk_length=abc", "invalid literal for int"),
        ("--config.loop.betas=(1.0,)", "betas must list one number for each of the 2 iterations"),
        ("--config.value.loss=mcts", "loss must be one of"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(tmp_path, flag, message):
    config = f"--config=tests/experiments/tiny.py:{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", config, f"--workdir={tmp_path / 'run'}", flag],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_exports_give_the_scores_that_the_search_used(finished):
    """Must agree for every finalist, whether EOS or the length limit ended it."""
    _, folder, _ = finished
    functions = [values.from_pretrained(folder / f"iter_{t}/value/export") for t in range(2)]
    rollouts = RolloutStore.open(folder / "eval" / "searches" / "iteration_2").all()
    assert {rollout.finished for rollout in rollouts} == {True, False}
    readings = [(rollout.prompt_tokens, rollout.tokens) for rollout in rollouts]
    found = [values.prefix_values(function, readings) for function in functions]
    expected = [a[-1] / 1.0 + b[-1] / 2.0 for a, b in zip(*found, strict=True)]
    np.testing.assert_allclose([r.score for r in rollouts], expected, atol=1e-5)
