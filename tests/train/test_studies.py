"Studies: all four systems from one file, stopped and taken up, and the tables are the same"

import json

import pandas as pd
import pytest

from covid_ct.cli import main
from covid_ct.scan import DataError
from covid_ct.train import studies
from covid_ct.train.studies import StudyError, _combinations, _study_table, read_study, run_study

FOUR = """
name = "four systems"
folds = 2
seeds = [0, 1]
[[run]]
recipe = "darnet/tiny"
phantoms = { patients = 15, shape = [32, 48, 48] }
[run.set]
epochs = 1
milestones = []
[run.set.model_kwargs]
classes = 3
depth = 32
width = 4
blocks = [1,1,1,1]
strides = [1,2,2,1]
[[run]]
recipe = "dual_sampling/tiny"
phantoms = { patients = 12, shape = [32, 48, 48], labels = ["cap", "covid"] }
[run.set]
epochs = 1
milestones = []
[run.set.model_kwargs]
classes = 2
depth = 24
width = 4
blocks = [1,1,1]
strides = [1,1,1]
[[run]]
recipe = "raunet/tiny"
phantoms = { n = 20, size = 33 }
[run.set]
epochs = 1
model_kwargs = { widths = [4,8], cardinality = 2, chunk = 16, heads = 1, rounds = 1 }
[[run]]
recipe = "prior_attention/tiny"
phantoms = { patients = 30, shape = [32, 48, 48] }
[run.set]
epochs = 1
model_kwargs = { depth = 32, width = 4, blocks = [1,1,1,1], hidden = 16 }
sampler_kwargs = { composition = { healthy = 4, ild = 3, covid = 3 }, batches = 2 }
"""


@pytest.mark.slow
def test_four_systems_stopped_and_taken_up(tmp_path, monkeypatch, capsys):
    four = FOUR.replace('seeds = [0, 1]', 'seeds = [1]')
    study, real, count = read_study(four), studies._run_one, []

    def impatient(*a):
        count.append(a)
        if len(count) == 4:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(studies, "_run_one", impatient)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "a", progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "a").rglob("test.csv"))) == 3
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("test.csv")}
    (tmp_path / "four.toml").write_text(four)
    assert (
        main(["study", str(tmp_path / "four.toml"), "--out", str(tmp_path / "a"), "--json"]) == 0
    )  # goes on by the command
    table = _study_table(study, tmp_path / "a")
    assert len(json.loads(capsys.readouterr().out)) == len(table) and all(
        p.stat().st_mtime_ns == s for p, s in stamps.items()
    )
    assert (
        set(table.reset_index().run)
        == {"darnet tiny", "dual_sampling tiny", "raunet tiny", "prior_attention tiny"}
        and (table["n"] == 2).all()
    )
    some = [c for c in _combinations(study) if c[1:] == (1, 1)]  # undisturbed, beside
    for e, s, k in some:
        a, b = (
            pd.read_csv(p / "test.csv")
            for p in (
                real(e, s, k, 2, tmp_path / "b"),
                tmp_path / "a" / e.name.replace(" ", "_") / "seed_1" / "fold_1",
            )
        )
        pd.testing.assert_frame_equal(a, b)


def test_what_cannot_be_carried_out_is_said(tmp_path):
    with pytest.raises(StudyError, match="cannot be read"):
        read_study(tmp_path / "none.toml")
    for bad in (
        FOUR.replace("folds = 2", "folds = 1"),
        FOUR.replace('seeds = [0, 1]', 'seeds = ["a"]'),
        FOUR.replace("n = 20", "slices = 20"),
        FOUR.replace("darnet/tiny", "darnet/huge"),
        FOUR.replace("epochs = 1", "epochs = 0", 1),
        FOUR + 'more = 1\n',
        FOUR.replace("raunet/tiny", "darnet/tiny"),
        FOUR.replace(
            'labels = ["cap", "covid"] }', 'labels = ["cap", "covid"] }\ncohort = "a.csv"'
        ),
    ):
        with pytest.raises(DataError):
            read_study(bad)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.json").write_text("{}")
    with pytest.raises(StudyError, match="another study"):
        run_study(read_study(FOUR), tmp_path / "s", progress=False)
    few = read_study(
        FOUR.replace("patients = 15", "patients = 3").split("[[run]]\nrecipe = \"dual")[0]
    )
    with pytest.raises(StudyError, match="4 of 4 failed; the first: darnet tiny, seed 0, fold 0"):
        run_study(few, tmp_path / "few", progress=False)
    with pytest.raises(StudyError, match="no finished run"):
        _study_table(few, tmp_path / "few")


def test_a_search_by_optuna(tmp_path):
    "It trains what was suggested, returns what was reached, and resumes without training twice"
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    e = read_study(
        'name = "search"\n[[run]]\nrecipe = "raunet/tiny"\nphantoms = { n = 12, size = 17 }\n'
        '[run.set]\nepochs = 1\nmodel_kwargs = '
        '{ widths = [4,8], cardinality = 2, chunk = 16, heads = 1, rounds = 1 }'
    ).runs[0]

    def space(trial):
        return dict(
            lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True),
            clip=trial.suggest_categorical("clip", [0.0, 1.0]),
        )

    def ask(day=0):
        return optuna.create_study(
            study_name="s",
            storage=f"sqlite:///{tmp_path / 'search.db'}",
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=day),
            load_if_exists=True,
        )

    value = studies.search_objective(e, space, tmp_path / "out", folds=2)
    ask(1).optimize(value, n_trials=2)
    ask(2).optimize(value, n_trials=1)  # another day; with the same seed it would ask the same
    search = ask()
    assert len(search.trials) == 3 and len({t.params["lr"] for t in search.trials}) == 3
    for t in search.trials:
        at = studies.combination_folder(
            studies.StudyEntry(f"trial_{t.number}", e.recipe), 0, 0, tmp_path / "out"
        )
        c = json.loads((at / "config.json").read_text())
        assert {k: c["recipe"][k] for k in t.params} == t.params and c["recipe"]["sources"][
            "lr"
        ] == f"trial {t.number}"
        assert t.value == pd.read_csv(at / "metrics.csv").valid_dice.max()
    assert search.best_value == max(t.value for t in search.trials)
