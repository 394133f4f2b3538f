"""The cost ledger: what it counts, and that a kill at any moment loses nothing stored."""

import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iro_jax.evaluation import Cost, Entry, Ledger, LedgerError


def entry(stage="rollouts", unit=0, phase="training", **cost):
    return Entry(stage, unit, phase, "1 x cpu", Cost(**cost))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "cost.jsonl"


def test_entries_come_back_as_they_were(path):
    written = [
        entry(unit=0, tokens_sampled=7, policy_flops=1.5e18, seconds=0.1, peak_memory_bytes=2**40),
        entry(unit="compressed", reward_queries=3, phase="inference"),
    ]
    ledger = Ledger(path)
    for item in written:
        ledger.append(item)
    assert Ledger(path).entries() == ledger.entries() == written


def test_a_line_is_one_flat_json_object(path):
    Ledger(path).append(entry(unit=4, tokens_read=9))
    [line] = path.read_text().splitlines()
    fields = json.loads(line)
    assert fields["stage"] == "rollouts"
    assert (fields["unit"], fields["phase"], fields["tokens_read"]) == (4, "training", 9)
    assert set(fields) == {
        *("stage", "unit", "phase", "device", "seconds", "compile_seconds", "peak_memory_bytes"),
        *("tokens_sampled", "tokens_read", "value_queries", "reward_queries"),
        *("policy_flops", "value_flops", "reward_flops"),
    }


def test_totals_by_phase_and_stage(path):
    ledger = Ledger(path)
    costs = {("rollouts", "training"): 1, ("fit", "training"): 20, ("test", "inference"): 300}
    for (stage, phase), tokens in costs.items():
        for unit in range(2):
            ledger.append(
                entry(stage, unit, phase, tokens_sampled=tokens, peak_memory_bytes=tokens + unit)
            )
    assert ledger.totals() == Cost(tokens_sampled=642, peak_memory_bytes=301)
    assert ledger.totals("training").tokens_sampled == 42
    assert ledger.totals("inference").tokens_sampled == 600
    assert ledger.totals(stage="fit").tokens_sampled == 40
    assert ledger.totals("inference", "fit") == Cost()


def test_a_unit_that_was_done_again_counts_once(path):
    ledger = Ledger(path)
    for unit, tokens in ((0, 5), (1, 7), (0, 6)):
        ledger.append(entry(unit=unit, tokens_sampled=tokens))
    assert ledger.totals().tokens_sampled == 13
    # What a kill has interrupted finds most of it done, which is no measure of what it takes.
    for seconds in (90.0, 2.0):
        ledger.append(entry("slow", seconds=seconds))
    assert ledger.totals(stage="slow").seconds == 90
    # A number and its name are two units, and so are those of another stage.
    ledger.append(entry(unit="0", tokens_sampled=100))
    ledger.append(entry("fit", unit=0, tokens_sampled=1000))
    assert ledger.totals().tokens_sampled == 1113


def test_costs_add_and_the_highest_memory_counts():
    a, b = Cost(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), Cost(10, 20, 30, 40, 50, 60, 70, 80, 90, 5)
    assert a + b == Cost(11, 22, 33, 44, 55, 66, 77, 88, 99, 10)
    assert a == Cost(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    c = a
    c += b
    assert c is a
    assert a.peak_memory_bytes == 10


def test_a_ledger_torn_anywhere_keeps_all_whole_lines(path):
    ledger = Ledger(path)
    for unit in range(3):
        ledger.append(entry(unit=unit, tokens_sampled=1 + unit))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    middles = range(ends[0], len(whole), 37)
    for cut in sorted(
        {*middles, *ends, *(end - 1 for end in ends[1:]), *(end + 1 for end in ends[:-1])}
    ):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        torn = Ledger(path)
        assert [e.unit for e in torn.entries()] == list(range(kept))
        # Reading is no repair: the writer may be alive.
        assert path.read_bytes() == whole[:cut]
        torn.append(entry(unit="next"))
        assert [e.unit for e in Ledger(path).entries()] == [*range(kept), "next"]


def test_a_broken_line_is_named_and_nothing_is_changed(path):
    ledger = Ledger(path)
    ledger.append(entry())
    for broken in (b"{}\n", b'{"stage": 1, "colour": 2}\n', b"\xff\n", b"[1]\n", b'{"stage"\n'):
        content = path.read_bytes()
        path.write_bytes(content + broken)
        with pytest.raises(LedgerError, match=r"cost\.jsonl, line 2: expected an entry.*Got: "):
            Ledger(path)
        assert path.read_bytes() == content + broken
        path.write_bytes(content)


def test_an_unknown_phase_or_a_number_that_is_none_is_refused(path):
    ledger = Ledger(path)
    with pytest.raises(ValueError, match=r"phase must be one of .* Got: 'tuning'"):
        ledger.append(entry(phase="tuning"))
    with pytest.raises(ValueError, match="JSON"):
        ledger.append(entry(policy_flops=float("nan")))
    assert ledger.entries() == []


def test_an_entry_that_does_not_fit_on_the_disk_leaves_the_others(path):
    resource = pytest.importorskip("resource")
    ledger = Ledger(path)
    ledger.append(entry(tokens_sampled=3))
    stored = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(stored) + 50, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"cost\.jsonl.*unit 1, could not be written; all earlier"
        ):
            ledger.append(entry(unit=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == stored
    ledger.append(entry(unit=1))
    assert [found.unit for found in ledger.entries()] == [0, 1]


def test_measure_fills_in_what_it_can_see(path):
    ledger = Ledger(path)
    with ledger.measure("fit", 2, "training") as cost:
        cost.value_flops += 1e9
        cost.tokens_read += np.int64(12)
        cost.value_queries += jnp.int32(5)
        time.sleep(0.05)
    [found] = ledger.entries()
    assert (found.stage, found.unit, found.phase) == ("fit", 2, "training")
    assert (found.cost.value_flops, found.cost.tokens_read) == (1e9, 12)
    assert found.cost.value_queries == 5
    assert found.cost.seconds >= 0.05
    assert found.cost.compile_seconds <= found.cost.seconds
    assert found.cost.peak_memory_bytes > 2**20
    assert found.device == f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def test_compilations_are_billed_where_they_happen(path):
    ledger = Ledger(path)
    step = jax.jit(lambda x: jnp.sin(x) @ x + 0.123)
    x = np.eye(17, dtype=np.float32)
    for unit in range(2):
        with ledger.measure("fit", unit, "training"):
            jax.block_until_ready(step(x))
    first, second = (found.cost for found in ledger.entries())
    assert 0 < first.compile_seconds < first.seconds
    assert second.compile_seconds == 0


def test_work_that_fails_is_not_billed(path):
    ledger = Ledger(path)
    with pytest.raises(RuntimeError, match="no luck"), ledger.measure("fit", 0, "training"):
        raise RuntimeError("no luck")
    assert ledger.entries() == []
    assert not path.exists()


WRITER = """
import sys
from iro_jax.evaluation import Cost, Entry, Ledger
ledger = Ledger(sys.argv[1])
for unit in range(10**6):
    ledger.append(Entry("rollouts", unit, "training", "1 x cpu", Cost(tokens_sampled=1)))
    if unit == 20:
        print("going", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_every_entry_that_it_had_appended(path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "going\n"
        seen = len(Ledger(path).entries())  # reading beside the writer
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    ledger = Ledger(path)
    units = [found.unit for found in ledger.entries()]
    assert units == list(range(len(units)))
    assert len(units) >= seen >= 21
    ledger.append(entry(unit="after"))
    assert Ledger(path).totals().tokens_sampled == len(units)
