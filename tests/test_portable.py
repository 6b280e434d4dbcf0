"""The command that runs pages and tests under other instruction sets, threads and seeds."""

import subprocess
import sys

import portable
import pytest
import torch


@pytest.fixture
def seeded(monkeypatch):
    "torch as it was, afterwards"
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(torch, "Generator", torch.Generator)


def draw(seed):
    return torch.rand(4, generator=torch.Generator().manual_seed(seed))


def test_seeds_are_shifted(seeded):
    plain = draw(7)
    torch.manual_seed(7)
    globally = torch.rand(4)
    portable.shift_seeds(3)
    assert torch.equal(draw(4), plain) and not torch.equal(draw(7), plain)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(4), globally)


def test_a_case_is_run_in_its_environment(tmp_path):
    "Two threads and a seed arrive in a page, which fails; the row says where"
    page = tmp_path / "a.ipynb"
    import nbformat

    code = (
        "import torch\ntorch.manual_seed(0)\n"
        "shown = torch.rand(1).item(), torch.get_num_threads()\n"
        "raise ValueError(f'{shown} ' + torch.backends.cpu.get_cpu_capability())"
    )
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(nb, page)
    case = dict(what=str(page), capability="default", threads="2", seed="5", onednn="no")
    row = portable.run(case, 100)
    first = torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    assert row["result"] == "failed" and f"ValueError: ({first}, 2) DEFAULT" in row["message"]
    assert portable.run(case, 0.1)["result"] == "too long"


def test_what_was_run_is_kept_and_what_changed_is_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(portable, "ROOT", tmp_path)
    ran = []

    def run(case, limit):
        ran.append((case["what"], case["threads"]))
        result = "failed" if case["threads"] == "2" else "passed"
        return case | dict(result=result, seconds=1, message="")

    monkeypatch.setattr(portable, "run", run)
    for name in "ab":
        (tmp_path / name).write_text(name)
    out = tmp_path / "out" / "results.csv"
    ask = ["a", "b", "--capability", "default", "--seeds", "0", "--out", str(out)]
    assert portable.main(ask) == 1 and len(ran) == 4 and len(portable.known(out)) == 4
    assert portable.main(ask) == 1 and len(ran) == 4
    assert portable.main([*ask, "--again"]) == 1 and ran[4:] == [("a", "2"), ("b", "2")]
    (tmp_path / "a").write_text("changed")
    assert portable.main([*ask, "--threads", "1"]) == 0 and ran[6:] == [("a", "1")]
    assert "4 cases, 0 to run" in capsys.readouterr().out


def test_what_trains_is_found():
    found = portable.subjects()
    assert {
        "nbs/papers/3_raunet.ipynb",
        "nbs/papers/2_dual_sampling.ipynb",
        "nbs/08_train/08_loop.ipynb",
        "tests/train/test_loop.py",
        "tests/models/test_lsh.py",
    } <= set(found)
    assert not {"nbs/02_io/04_dicom_header.ipynb", "tests/test_house.py"} & set(found)
    assert not any("reports" in f for f in found)


def test_its_help_names_the_table():
    r = subprocess.run(
        [sys.executable, portable.__file__, "--help"], capture_output=True, text=True
    )
    assert r.returncode == 0 and "_portable/results.csv" in r.stdout
