"""The loop, its recipes and run folders: determinism, kill and resume, bad folders, folds."""

import json
import os
import random
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import test_lab
import torch
from torch import nn

from covid_ct.cohort.splits import assert_disjoint, split_patients
from covid_ct.cohort.splits import test_part as held_out
from covid_ct.evaluate.metrics import PredictionError
from covid_ct.models.zoo import ROWS
from covid_ct.scan import DataError, SplitError, WriteError
from covid_ct.train import loop
from covid_ct.train.loop import (
    Callback,
    Engine,
    TrainError,
    _make_accelerator,
    fit,
    learning_rate,
    load_run,
    predict_batches,
)
from covid_ct.train.recipes import (
    RECIPES,
    Recipe,
    RecipeError,
    build_model,
    change,
    from_dict,
    recipe,
    source_table,
    sourced_fields,
    to_dict,
)
from covid_ct.train.run_folder import (
    AuditWarning,
    RunError,
    RunFolder,
    UncheckedWarning,
    audit_hint,
    read_tensors,
    run_split,
)
from covid_ct.train.study import (
    cross_validate,
    evaluate,
    fold_loaders,
    score_test,
    train,
    train_fold,
    with_folds,
)
from covid_ct.train.tasks import TaskError, dice_of_counts, dice_rows, dice_table, segment_rows

C3 = ("healthy", "cap", "covid")
R = change(
    recipe(),
    "test",
    system="toy",
    name="toy",
    prep="",
    model="",
    model_kwargs={},
    epochs=4,
    lr=1e-2,
    milestones=(2,),
    augment="none",
    batch_size=4,
    keep="loss",
)


def blobs(n, seed, size=4):
    "Batches in which the class is a brightness"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.rand(n, 1, 4, 6, 6, generator=g) + 0.25 * y[:, None, None, None, None]
    return [
        dict(
            image=x[i : i + size],
            label=y[i : i + size],
            scan_id=[f"s{seed}-{j}" for j in range(i, min(n, i + size))],
            patient_id=[f"p{seed}-{j // 2}" for j in range(i, min(n, i + size))],
        )
        for i in range(0, n, size)
    ]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, 2, 1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * 2 * 3 * 3, 3),
    )


class Shuffled:
    "Order from the global generator, which resuming must restore; `stop`: an error after steps"

    def __init__(self, batches, stop=None, error=KeyboardInterrupt):
        self.batches, self.left, self.error, self.epochs = batches, stop, error, []

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, e):
        self.epochs.append(e)

    def __iter__(self):
        order = torch.randperm(len(self.batches)).tolist()
        random.random()
        np.random.rand()
        for i in order:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise self.error
            yield self.batches[i]


def go(out, model=None, train=None, r=R, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AuditWarning)
        return fit(
            model or net(),
            train or Shuffled(blobs(22, 1)),
            blobs(9, 2),
            r,
            out,
            progress=False,
            **kw,
        )


def weights(out, which="last"):
    return read_tensors(out / "checkpoints" / f"{which}.safetensors")[0]


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def told(run):
    return run.outcome


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go(
        tmp_path_factory.mktemp("whole") / "run",
        about=dict(trained_on="phantom blobs", split_hash="h"),
    )


def test_same_seed_same_weights(whole, tmp_path):
    twin = go(tmp_path / "twin")
    assert same(weights(whole.folder), weights(twin.folder)) and told(whole).equals(told(twin))
    assert not same(
        weights(whole.folder), weights(go(tmp_path / "other", r=change(R, seed=1)).folder)
    )  # other dropout, other order


def test_it_learns_and_keeps_the_best(whole):
    h = whole.history
    assert (
        h.train_loss.iloc[-1] < h.train_loss.iloc[0]
        and list(h.epoch) == [1, 2, 3, 4]
        and np.allclose(h.lr, [1e-2, 1e-2, 1e-3, 1e-3])
    )
    assert (
        whole.best["valid_loss"] == h.valid_loss.min()
        and same(whole.model.state_dict(), weights(whole.folder, "best"))
        and not whole.model.training
    )
    p = predict_batches(whole.model, blobs(9, 2), C3)
    assert np.allclose(p.filter(like="prob_"), whole.predictions.filter(like="prob_")) and list(
        p.scan_id
    ) == list(whole.predictions.scan_id)
    y = np.array([C3.index(c) for c in p.label])
    ce = -np.log(p.filter(like="prob_").to_numpy()[range(9), y]).mean()
    assert np.isclose(ce, whole.best["valid_loss"], rtol=1e-5)


@pytest.mark.parametrize("keep", ["accuracy", "auc"])
def test_keep_is_obeyed(tmp_path, keep):
    run = go(tmp_path / "r", r=change(R, keep=keep))
    assert run.best[f"valid_{keep}"] == run.history[f"valid_{keep}"].max()


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_ctrl_c_and_resume_equal_uninterrupted(whole, tmp_path, epoch):
    out, n = tmp_path / "r", len(blobs(22, 1))
    run = go(out, train=Shuffled(blobs(22, 1), epoch * n + 2))
    assert run.interrupted and len(run.history) == epoch and run.config["status"] == "interrupted"
    assert (out / "checkpoints" / "last.safetensors").exists() and (epoch == 0) == (
        not (out / "checkpoints" / "best.safetensors").exists()
    )
    loader = Shuffled(blobs(22, 1))
    torch.manual_seed(99)
    again = go(out, net(0), loader, resume=True)
    assert loader.epochs == list(range(epoch, 4)) and not again.interrupted
    assert (
        same(weights(out), weights(whole.folder))
        and same(weights(out, "best"), weights(whole.folder, "best"))
        and told(again).equals(told(whole))
    )
    assert pd.read_csv(out / "metrics.csv").epoch.tolist() == [1, 2, 3, 4] and not list(
        out.rglob(".*")
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_resumes(whole, tmp_path):
    code = (
        "import sys,os,signal; sys.path.insert(0, sys.argv[1]); import test_loop as t\n"
        "class Kill(Exception):\n    def __init__(self, *a): os.kill(os.getpid(), signal.SIGKILL)\n"
        "class S(t.Shuffled):\n    def __iter__(self):\n        for b in super().__iter__():\n"
        "            self.seen=getattr(self,'seen',0)+1\n"
        "            if self.seen==15: os.kill(os.getpid(), signal.SIGKILL)\n"
        "            yield b\n"
        "t.go(__import__('pathlib').Path(sys.argv[2]), train=S(t.blobs(22,1)))"
    )
    out = tmp_path / "r"
    r = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert r.returncode == -signal.SIGKILL, r.stderr[-2000:]
    assert (
        json.loads((out / "config.json").read_text())["status"] == "running"
        and len(pd.read_csv(out / "metrics.csv")) == 2
    )
    again = go(out, resume="auto")
    assert same(weights(out), weights(whole.folder)) and told(again).equals(told(whole))


@pytest.mark.parametrize(
    "at", ["state.safetensors", "best.safetensors", "last.safetensors", "metrics.csv"]
)
def test_a_write_that_fails_costs_one_epoch_at_most(whole, tmp_path, monkeypatch, at):
    "The disk is full in the second epoch, at any of its files"
    out, count, original = tmp_path / "r", [], os.replace

    def full(a, b):
        if str(b).endswith(at):
            count.append(b)
        if str(b).endswith(at) and len(count) == 2:
            raise OSError("disk full")
        original(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError, match="disk full"):
        go(out)
    monkeypatch.undo()
    assert not [p for p in out.rglob(".*")]
    assert told(go(out, resume=True)).equals(told(whole)) and same(
        weights(out), weights(whole.folder)
    )


def test_nan_names_the_scans(tmp_path):
    bad = blobs(22, 1)
    bad[3] = dict(bad[3], image=bad[3]["image"] * float("nan"))
    with pytest.raises(TrainError, match="s1-12, s1-13, s1-14, s1-15.*nan in training"):
        fit(net(), bad, blobs(9, 2), R, tmp_path / "a", progress=False)
    with pytest.raises(TrainError, match="s1-12.*in validation"):
        fit(net(), blobs(9, 2), bad, R, tmp_path / "b", progress=False)


def test_iterators_and_empty_sets_are_refused(tmp_path):
    with pytest.raises(TrainError, match="gave no batches"):
        fit(net(), iter(blobs(9, 1)), blobs(9, 2), R, tmp_path / "a", progress=False)
    with pytest.raises(TrainError, match="valid.*gave no batches"):
        fit(net(), blobs(9, 1), [], R, tmp_path / "b", progress=False)
    with pytest.raises(TaskError, match="for the classes"):
        predict_batches(nn.Sequential(nn.Flatten(), nn.Linear(144, 2)), blobs(3, 1), C3)


def test_folders_of_others_stay_untouched(whole, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.txt").write_text("mine")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"recipe"')
    for folder, kw in (
        (foreign, {}),
        (foreign, dict(resume="auto")),
        (broken, dict(resume=True)),
        (whole.folder, {}),
        (whole.folder, dict(resume="auto", r=change(R, lr=0.5))),
        (whole.folder, dict(resume=True, about=dict(split_hash="other"))),
        (whole.folder, dict(resume="maybe")),
    ):
        before = snapshot(folder)
        with pytest.raises(RunError):
            go(folder, **kw)
        assert snapshot(folder) == before
    with pytest.raises(RunError, match="no run to resume"):
        go(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_resuming_a_finished_run_trains_nothing(whole):
    loader = Shuffled(blobs(22, 1), 0, AssertionError)
    run = go(whole.folder, net(5), loader, resume="auto")
    assert (
        same(run.model.state_dict(), weights(whole.folder, "best"))
        and told(run).equals(told(whole))
        and run.config["trained_on"] == "phantom blobs"
        and run.config["split_hash"] == "h"
    )


class Records(Callback):
    "What a callback is given; stops after some steps or epochs"

    def __init__(self, step=None, epoch=None):
        self.steps, self.epochs, self.stop_step, self.stop_epoch = [], [], step, epoch

    def on_step(self, trainer, numbers):
        self.steps.append((trainer.epoch, trainer.state.steps, numbers))
        if len(self.steps) == self.stop_step:
            trainer.stop()
        numbers.clear()  # a copy: the history does not change

    def on_epoch(self, trainer, row):
        assert trainer.run.file("last").is_file() and len(trainer.run.history) == row["epoch"]
        self.epochs.append(row)
        if len(self.epochs) == self.stop_epoch:
            trainer.stop()


def test_callbacks_see_all_and_change_nothing(whole, tmp_path):
    "Each step and each epoch once, in order, with the numbers of the history"
    one, two = Records(), Callback()
    run = go(tmp_path / "r", callbacks=(one, two))
    assert same(weights(run.folder), weights(whole.folder)) and told(run).equals(told(whole))
    n = len(blobs(22, 1))
    assert [s[:2] for s in one.steps] == [(i // n, i + 1) for i in range(4 * n)]
    assert pd.DataFrame(one.epochs).equals(run.history)


@pytest.mark.parametrize("when", [dict(step=3), dict(step=9), dict(epoch=1), dict(epoch=3)])
def test_a_callback_stops_and_the_run_resumes(whole, tmp_path, when):
    "After the step, or after the epoch; resumed, the run ends where an undisturbed one ends"
    stop = Records(**when)
    run = go(tmp_path / "r", callbacks=[stop])
    n = len(blobs(22, 1))
    assert run.interrupted and run.status == "interrupted"
    assert len(stop.steps) == when.get("step", n * when.get("epoch", 0))
    rest = Records()
    again = go(tmp_path / "r", resume=True, callbacks=[rest])
    assert len(stop.steps) + len(rest.steps) == 4 * n
    assert again.status == "finished" and told(again).equals(told(whole))
    assert same(weights(again.folder), weights(whole.folder))


def test_stopping_after_the_last_epoch_is_finishing(whole, tmp_path):
    run = go(tmp_path / "r", callbacks=[Records(epoch=4)])
    assert run.status == "finished" and told(run).equals(told(whole))


def test_an_error_in_a_callback_is_raised_and_the_run_resumes(whole, tmp_path):
    class Broken(Callback):
        def on_epoch(self, trainer, row):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "r", callbacks=[Broken()])
    again = go(tmp_path / "r", resume=True)
    assert told(again).equals(told(whole)) and RunFolder(again.folder).status == "finished"


def test_a_run_folder_gives_what_fit_gave(whole, tmp_path):
    "Read by another process: the same parts, each when it is asked for"
    run = RunFolder(whole.folder)
    assert run.config == whole.config and run.recipe == whole.recipe == R
    assert run.history.equals(whole.history) and run.predictions.equals(whole.predictions)
    assert run.best == whole.best and run.outcome.equals(whole.outcome)
    assert run.status == "finished" and not run.interrupted and run.fold is None
    assert run.split is None  # batches of the caller, who named only its hash
    assert same(run.load_model(model=net(9)).state_dict(), whole.model.state_dict())
    with pytest.raises(RunError, match="not in the zoo"):
        run.model  # noqa: B018
    empty = RunFolder(tmp_path)
    assert empty.history.empty and empty.predictions.empty
    for part in ("config", "recipe", "status", "model", "split"):
        with pytest.raises(RunError, match="no run folder"):
            getattr(empty, part)
    with pytest.raises(RunError, match="is not there"):
        empty.read_predictions()
    for name in ("metrics.csv", "predictions.csv"):
        (tmp_path / name).write_bytes(b'"\xff\xfe')
    for part in ("history", "predictions"):
        with pytest.raises(RunError, match="cannot be read"):
            getattr(RunFolder(tmp_path), part)


def test_load_run(whole, tmp_path):
    model, r, config = load_run(whole.folder, model=net(9))
    assert (
        r == R
        and config["recipe_hash"] == R.hash
        and same(model.state_dict(), weights(whole.folder, "best"))
        and not model.training
    )
    assert same(load_run(whole.folder, "last", net(9)).model.state_dict(), weights(whole.folder))


def test_a_damaged_or_foreign_folder_is_not_loaded(whole, tmp_path):
    def copy(**change):
        d = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        (d / "checkpoints").mkdir(parents=True)
        for name in ("config.json", "checkpoints/best.safetensors"):
            (d / name).write_bytes((whole.folder / name).read_bytes())
        c = json.loads((d / "config.json").read_text())
        c.update(change)
        (d / "config.json").write_text(json.dumps(c))
        return d

    cut = copy()
    (cut / "checkpoints/best.safetensors").write_bytes(
        (whole.folder / "checkpoints/best.safetensors").read_bytes()[:-20]
    )
    text = copy()
    (text / "checkpoints/best.safetensors").write_text("hello")
    lost = copy()
    (lost / "checkpoints/best.safetensors").unlink()
    raw = to_dict(R)
    for folder, kw in (
        (tmp_path / "no", {}),
        (whole.folder, {}),
        (whole.folder, dict(model=nn.Linear(2, 2))),
        (cut, dict(model=net())),
        (text, dict(model=net())),
        (lost, dict(model=net())),
        (copy(recipe={**raw, "lr": 1.0}), dict(model=net())),
        (copy(recipe={**raw, "pickle": 1}), dict(model=net())),
        (copy(recipe=3), dict(model=net())),
        (copy(recipe={**raw, "model": "darnet", "model_kwargs": {"wings": 2}}), {}),
    ):
        with pytest.raises(RunError):
            load_run(folder, **kw)


def test_nothing_in_a_folder_is_a_pickle(whole):
    import pickletools

    for p, b in snapshot(whole.folder).items():
        with pytest.raises((ValueError, KeyError, UnicodeError, IndexError)):
            list(pickletools.genops(b))
        assert b"PK\x03\x04" not in b[:4], p


def test_others_may_read_it(whole):
    "Every file gets the permissions of a file made here, also those that safetensors makes private"
    (whole.folder.parent / "plain").touch()
    mode = (whole.folder.parent / "plain").stat().st_mode
    assert {p.stat().st_mode for p in whole.folder.rglob("*") if p.is_file()} == {mode}


def test_card_and_config_say_what_they_must(whole):
    card, c = (
        (whole.folder / "model_card.md").read_text("utf-8"),
        json.loads((whole.folder / "config.json").read_text()),
    )
    for words in (
        "Not for clinical use",
        "phantom blobs",
        R.hash,
        "interval over patients",
        "| covid vs rest | AUC |",
        "| macro | F1 |",
    ):
        assert words in card
    assert (
        c["status"] == "finished"
        and c["hardware"]["device"] == "cpu"
        and c["versions"]["torch"] == torch.__version__
        and from_dict(c["recipe"]) == R
        and c["split_hash"] == "h"
    )


def test_too_good_is_said(tmp_path):
    easy = blobs(24, 1)
    for b in easy:
        b["image"] = (
            b["label"].float()[:, None, None, None, None].expand(-1, 1, 4, 6, 6).contiguous()
        )
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    r = change(R, epochs=30, milestones=(), lr=3e-2)
    with pytest.warns(AuditWarning, match="Audit the data"):
        fit(model, easy, easy, r, tmp_path / "a", progress=False)
    assert "Audit" in (tmp_path / "a" / "model_card.md").read_text("utf-8")
    assert "phantoms" in audit_hint(1.0, "240 phantom patients") and not audit_hint(0.9)


def test_outputs_reach_the_loss_and_precisions_alternate(tmp_path, monkeypatch):
    class Talks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x)

        def outputs(self, x):
            return dict(logits=self.body(x), extra=x.mean())

    seen = []

    def loss(outputs, batch):
        seen.append((sorted(outputs), outputs["logits"].dtype))
        total = nn.functional.cross_entropy(outputs["logits"], batch["label"])
        return total, dict(twice=2 * total.detach())

    monkeypatch.setattr(loop, "build_loss", lambda *a, **k: loss)
    model = Talks()
    forward = model.forward
    for precision in ("bf16", "no"):
        run = go(tmp_path / precision, model, r=change(R, precision=precision, epochs=1))
        assert np.isclose(run.history.train_twice[0], 2 * run.history.train_loss[0])
    assert (
        set(map(str, seen)) == {"(['extra', 'logits'], torch.float32)"} and model.forward == forward
    )


def test_fp16_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 works")
    with pytest.raises(TrainError, match="fp16"):
        _make_accelerator("fp16")
    assert _make_accelerator("no").mixed_precision == "no"


def test_rate():
    p = recipe("darnet", "paper")
    assert np.allclose(
        [learning_rate(p, e) for e in (0, 29, 30, 59, 60, 79)], [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    )


def test_predict_restores_mode_and_knows_unlabelled_scans():
    m = net().train()
    p = predict_batches(m, [dict(image=torch.rand(2, 1, 4, 6, 6), scan_id=["a", "b"])], C3)
    assert (
        m.training
        and list(p.scan_id) == ["a", "b"]
        and p.label.isna().all()
        and np.allclose(np.exp(p.logit_cap - p.logit_covid), p.prob_cap / p.prob_covid)
    )


def test_frozen_layers_stay_frozen():
    "Predicting restores the mode of every module, also in sliding windows and tables of sizes"
    from covid_ct.inference.segment import segment_slices
    from covid_ct.inference.sliding_window import _slabs
    from covid_ct.models.cost import _effective_field
    from covid_ct.models.prior_attention import size_table
    from covid_ct.models.resnet3d import stage_table
    from covid_ct.models.zoo import build
    from covid_ct.scan import Scan

    def modes(m):
        return [(n, k.training) for n, k in m.named_modules()]

    def asked(m, ask):
        m.train()
        norm = next(k for k in m.modules() if isinstance(k, (nn.BatchNorm2d, nn.BatchNorm3d)))
        norm.eval()
        before = modes(m)
        ask(m)
        assert modes(m) == before and m.training and not norm.training

    flat = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    full = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2))
    resnet = build("darnet", classes=3, depth=8, width=4, blocks=(1, 1, 1, 1))
    scan = Scan(
        np.random.default_rng(0).normal(-600, 200, (3, 16, 16)).astype("i2"), (5.0, 2.0, 2.0)
    )
    asked(net(), lambda m: predict_batches(m, blobs(6, 1), C3))
    asked(flat, lambda m: segment_slices(m, scan, 16))
    asked(full, lambda m: [*_slabs(m, np.zeros((1, 8, 8, 8), "f4"), (4, 4, 4))])
    asked(resnet, lambda m: stage_table(m, (8, 32, 32)))
    asked(resnet, lambda m: _effective_field(m, torch.rand(1, 1, 8, 32, 32)))
    small = build("pa-66-m", **ROWS["pa-66-m"].small)
    asked(small, size_table)


def test_predict_restores_after_an_error():
    m = net().train()
    m[1].eval()
    with pytest.raises(KeyError):
        predict_batches(m, [dict(picture=1)], C3)
    assert m.training and not m[1].training and m[3].training


# recipes


@pytest.mark.parametrize("key", RECIPES)
def test_recipes_are_complete(key):
    r = RECIPES[key]
    assert from_dict(json.loads(json.dumps(to_dict(r)))) == r and (r.system, r.name) == key
    assert (
        list(source_table(r).index) == sourced_fields()
        and r.model in (*ROWS, "")
        and r.hash == from_dict(to_dict(r)).hash
    )


def test_recipe_refusals():
    words = ("prep", "model", "augment", "sampler", "loss", "precision", "keep", "optimizer")
    for bad in (
        *({k: "x"} for k in words),
        dict(epochs=0),
        dict(epochs=2.5),
        dict(batch_size=True),
        dict(lr=0),
        dict(lr="1"),
        dict(weight_decay=-1),
        dict(seed=0.5),
        dict(classes=("a",)),
        dict(milestones=(5, 3)),
        dict(model_kwargs=dict(classes=2, depth=32)),
        dict(model_kwargs={}),
        dict(loss_kwargs=dict(weights=[1, 2])),
        dict(model_kwargs=dict(gates={1, 2})),
        dict(wings=2),
    ):
        with pytest.raises(RecipeError):
            change(recipe(), **bad)
    with pytest.raises(RecipeError, match="no source"):
        Recipe("a", "b", C3)
    with pytest.raises(RecipeError, match="no recipe"):
        recipe("darnet", "huge")
    for bad in (
        [],
        {},
        {**to_dict(R), "x": 1},
        {**to_dict(R), "milestones": 3},
        {**to_dict(R), "epochs": "ten"},
    ):
        with pytest.raises(RecipeError):
            from_dict(bad)
    assert issubclass(RecipeError, DataError) and change(recipe(), epochs=2).epochs == 2


KIND = {
    "classes": "a list",
    "milestones": "a list",
    "faults": "a list",
    "model_kwargs": "a dict",
    "loss_kwargs": "a dict",
    "sampler_kwargs": "a dict",
    "sources": "a dict",
    **{
        k: "a whole number"
        for k in (
            "batch_size",
            "epochs",
            "decay_every",
            "warmup",
            "accumulate",
            "seed",
            "slice_size",
        )
    },
    **{k: "a number" for k in ("lr", "weight_decay", "decay", "clip", "ema")},
}


@pytest.mark.parametrize("k", list(to_dict(R)))
def test_every_field_refuses_what_it_cannot_be(k):
    "Whatever JSON can hold, for every field: the error names field, value and what is accepted"
    kind = KIND.get(k, "a word")
    good = {
        "a word": (str,),
        "a list": (list,),
        "a dict": (dict,),
        "a whole number": (int,),
        "a number": (int, float),
    }[kind]
    for v in (None, True, 5, 2.5, "x", [1], {"a": 1}, float("nan"), float("inf")):
        if type(v) in good and v == v and v != float("inf"):
            continue
        with pytest.raises(RecipeError) as e:
            change(R, **{k: v})
        assert f"{k}={v!r}" in str(e.value) and kind in str(e.value)
        with pytest.raises(RecipeError):
            from_dict({**to_dict(R), k: v})


@pytest.mark.parametrize(
    "word",
    ["milestones=5", "lr=null", "epochs=2.5", "seed=-1", "classes=covid", 'model_kwargs=[1]'],
)
def test_the_command_says_what_a_field_accepts(tmp_path, capsys, word):
    from covid_ct.cli import main

    assert main(["train", str(tmp_path / "c"), str(tmp_path / "r"), "--set", word]) == 2
    told = capsys.readouterr().err.strip()
    assert word.partition("=")[0] in told and "Give a" in told and len(told.splitlines()) == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "k, v",
    [
        ("lr", 0),
        ("lr", -1.0),
        ("decay", 0.0),
        ("weight_decay", -0.1),
        ("ema", 1),
        ("clip", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("slice_size", 0),
        ("warmup", -1),
        ("epochs", 0),
    ],
)
def test_ranges(k, v):
    with pytest.raises(RecipeError) as e:
        change(R, **{k: v})
    assert f"{k}={v!r}" in str(e.value) and "Give a" in str(e.value)


@pytest.mark.parametrize(
    "k, v",
    [
        ("milestones", [0.5]),
        ("milestones", ["a"]),
        ("milestones", [0]),
        ("classes", ["a", 3]),
        ("sampler_kwargs", {"composition": 3}),
        ("sampler_kwargs", {"composition": {"cap": "two"}}),
        ("loss_kwargs", {"weights": 3}),
        ("loss_kwargs", {"weights": ["a", "b", "c"]}),
    ],
)
def test_what_is_inside_a_field(k, v):
    with pytest.raises(RecipeError):
        change(R, **{"sampler": "composition", k: v} if k == "sampler_kwargs" else {k: v})


def test_a_changed_recipe_says_so():
    "In its name, however it was changed; its own values restore it; a seed is no change"
    p = recipe("darnet", "paper")
    assert (
        change(p, lr=0.1, epochs=3).name
        == "paper (changed: lr, epochs)"
        == change(change(p, epochs=3), lr=0.1).name
    )
    assert change(change(p, lr=0.1), lr=p.lr).name == "paper" == change(p, seed=4).name
    assert (
        change(p, lr=0.1, name="paper").name == "paper (changed: lr)"
        and change(p, lr=0.1, name="mine").name == "mine"
    )
    assert from_dict({**to_dict(p), "lr": 0.1}).name == "paper (changed: lr)" and from_dict(
        to_dict(change(p, lr=0.1))
    ) == change(p, lr=0.1)
    mine = change(p, name="mine", system="ours", lr=0.1)
    assert change(change(mine, lr=0.2), epochs=4).name == "mine (changed: lr, epochs)"
    assert change(p, lr=0.1).hash == change(p, name="mine", lr=0.1).hash


def test_the_run_folder_says_so_too(study, tmp_path):
    cohort, r = study
    run = train_fold(cohort, 0, r, tmp_path / "r", progress=False, load=load)
    name = run.config["recipe"]["name"]
    assert (
        name.startswith("tiny (changed: ")
        and "epochs" in name
        and name in (tmp_path / "r" / "model_card.md").read_text("utf-8").splitlines()[0]
    )


# folds


def load(row):
    "A scan of a class brightness, in no time"
    from covid_ct.scan import Scan

    v = (
        np.random.default_rng(int(row.seed))
        .normal(-900 + 150 * C3.index(row.label), 60, (8, 12, 12))
        .astype("i2")
    )
    return Scan(v, (5.0, 5.0, 5.0), patient_id=row.patient_id, scan_id=row.scan_id)


@pytest.fixture
def study(monkeypatch):
    from covid_ct.preprocess.resample import PREPS, Prep

    monkeypatch.setitem(PREPS, "brick", Prep(size=(8, 32, 32)))
    from covid_ct.phantom.cohort import phantom_cohort

    return (
        split_patients(phantom_cohort(30, seed=2), folds=3, test=0.2),
        change(
            recipe(),
            "test",
            prep="brick",
            model="darnet-none",
            model_kwargs=dict(classes=3, depth=8, width=4),
            epochs=1,
        ),
    )


def test_folds(study, tmp_path, monkeypatch):
    cohort, r = study
    train, valid, test = fold_loaders(cohort, 0, r, load=load)
    assert_disjoint(train.dataset.cohort, valid.dataset.cohort, test.dataset.cohort)
    assert (
        train.augment
        and not valid.augment
        and not test.augment
        and type(train.part.batches.sampler).__name__ == "ClassBalancedSampler"
    )
    table = cross_validate(
        cohort, r, tmp_path / "cv", dict(trained_on="bricks"), progress=False, load=load
    )
    assert list(table.columns) == ["fold_0", "fold_1", "fold_2", "mean", "std"] and len(table) == 10
    assert np.allclose(table["mean"], table.iloc[:, :3].mean(axis=1)) and np.allclose(
        table["std"], np.std(table.iloc[:, :3], axis=1, ddof=1)
    )
    for k in range(3):
        p = pd.read_csv(tmp_path / "cv" / f"fold_{k}" / "predictions.csv", dtype=str)
        assert set(p[p.part == "test"].scan_id) == set(held_out(cohort).scan_id) and set(
            p[p.part == "valid"].scan_id
        ) == set(cohort[cohort.fold == k].scan_id)
        model, _, c = load_run(tmp_path / "cv" / f"fold_{k}")
        assert c["fold"] == k and "## Test set" in (
            tmp_path / "cv" / f"fold_{k}" / "model_card.md"
        ).read_text("utf-8")
    monkeypatch.setattr(loop, "_step", None)  # finished folds are not trained again
    assert cross_validate(cohort, r, tmp_path / "cv", progress=False, load=load).equals(table)
    with pytest.raises(RunError, match="another recipe"):
        cross_validate(cohort, change(r, lr=0.1), tmp_path / "cv", progress=False, load=load)
    with pytest.raises(RunError, match="another split"):
        cross_validate(
            split_patients(cohort.drop(columns="fold"), 3, seed=7),
            r,
            tmp_path / "cv",
            progress=False,
            load=load,
        )


def test_a_fold_is_deterministic(study, tmp_path):
    cohort, r = study
    a, b = (train_fold(cohort, 1, r, tmp_path / n, progress=False, load=load) for n in "ab")
    assert same(weights(a.folder), weights(b.folder)) and a.predictions.equals(b.predictions)


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_belongs_to_one_fold(study, tmp_path, monkeypatch, finished):
    "Fold 1 is refused in the folder of fold 0, stopped or finished; nothing is touched"
    cohort, r = study

    def stopped(*a, **k):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        if not finished:
            m.setattr(loop, "_step", stopped)
        run = train_fold(cohort, 0, r, tmp_path / "r", progress=False, load=load)
    assert run.interrupted != finished
    before = snapshot(tmp_path / "r")
    for call in (train_fold, lambda c, k, *a, **kw: train(c, *a, fold=k, **kw)):
        with pytest.raises(
            RunError, match="r: holds a run of another fold .0, not 1.*another folder"
        ):
            call(cohort, 1, r, tmp_path / "r", progress=False, load=load)
        assert snapshot(tmp_path / "r") == before
    (tmp_path / "cv").mkdir()
    (tmp_path / "r").rename(tmp_path / "cv" / "fold_1")
    with pytest.raises(RunError, match="another fold"):
        cross_validate(cohort, r, tmp_path / "cv", progress=False, load=load)
    assert {p.name for p in (tmp_path / "cv").iterdir()} == {"fold_1"}
    if not finished:
        train_fold(cohort, 0, r, tmp_path / "cv" / "fold_1", progress=False, load=load)


def test_a_split_is_not_taken_up_where_none_was_named(study, tmp_path):
    cohort, r = study
    batches = [*fold_loaders(cohort, 0, r, load=load)[0]]
    torch.manual_seed(0)
    fit(build_model(r), batches, batches, r, tmp_path / "r", progress=False)
    with pytest.raises(RunError, match="none named"):
        train_fold(cohort, 0, r, tmp_path / "r", progress=False, load=load)


@pytest.mark.parametrize("how", ["train_fold", "train", "cross_validate", "fit"])
def test_every_run_carries_its_split(study, tmp_path, monkeypatch, how):
    "It is there before the first step, names every patient, and evaluation is refused by it"
    cohort, r = study
    seen, real = [], loop._step

    def looks(*a, **k):
        seen.extend(len(pd.read_csv(p)) for p in tmp_path.rglob("split.csv"))
        return real(*a, **k)

    monkeypatch.setattr(loop, "_step", looks)
    out = tmp_path / "cv" / "fold_0" if how == "cross_validate" else tmp_path / "r"
    kw = dict(progress=False, load=load)
    if how == "train_fold":
        train_fold(cohort, 0, r, out, **kw)
    if how == "train":
        train(cohort, r, out, **kw)
    if how == "cross_validate":
        cross_validate(cohort, r, out.parent, **kw)
    if how == "fit":
        a, b, _ = fold_loaders(cohort, 0, r, load=load)
        fit(build_model(r), a, b, r, out, about=dict(fold=0), progress=False)
    assert seen and seen[0] == len(run_split(out)) == (
        len(cohort) if how != "fit" else (cohort.fold >= 0).sum()
    )
    for fold in (0, 1):
        with pytest.raises(SplitError, match="both sides"):
            evaluate(out, cohort[cohort.fold == fold], load=load)
    with pytest.raises(SplitError):
        evaluate(out, cohort, load=load, unchecked=True)
    found = evaluate(out, held_out(cohort), load=load)
    assert len(found) == len(held_out(cohort)) and found.attrs["warnings"] == []


@pytest.mark.slow
def test_the_command_refuses_patients_of_the_training(tmp_path, monkeypatch, capsys):
    "One line, exit code 2, nothing written; and so for the run that make demo leaves"
    from covid_ct import demo
    from covid_ct.cli import main

    class Enough(Exception):
        pass

    def enough(*a, **k):
        raise Enough

    kw = dict(classes=3, depth=32, width=2, blocks=(1, 1, 1, 1), strides=(2, 2, 2, 1))
    monkeypatch.setattr(demo, "_known_lungs", enough)
    monkeypatch.setattr(demo, "recipe", lambda *a: change(recipe(), model_kwargs=kw))
    with pytest.raises(Enough):
        demo.run_demo(tmp_path / "d", patients=30, epochs=1, jobs=1)
    assert len(run_split(tmp_path / "d" / "run")) > 30
    csv = next((tmp_path / "d" / "scans").glob("cohort.csv"))
    capsys.readouterr()
    run, out = tmp_path / "d" / "run", tmp_path / "answers.csv"
    code = main(["evaluate", str(csv), "--run", str(run), "--out", str(out)])
    told = capsys.readouterr().err.strip()
    assert code == 2 and "both sides" in told and len(told.splitlines()) == 1 and not out.exists()


def test_a_test_set_that_was_trained_on(study, tmp_path):
    cohort, r = study
    run = train_fold(cohort, 0, r, tmp_path / "r", progress=False, load=load)
    before = snapshot(tmp_path / "r")
    for part in fold_loaders(cohort, 0, r, load=load)[:2]:
        with pytest.raises(SplitError, match="both sides"):
            score_test(run, part)
    assert (
        snapshot(tmp_path / "r") == before
        and len(score_test(run, fold_loaders(cohort, 0, r, load=load)[2])) > 3
    )


def test_runs_without_a_split(study, tmp_path):
    "Older runs: the file one folder up is found, a wrong one or none is refused"
    cohort, r = study
    out = tmp_path / "cv" / "fold_0"
    train_fold(cohort, 0, r, out, progress=False, load=load)
    test, learned = held_out(cohort), cohort[cohort.fold == 1]
    (out / "split.csv").rename(out.parent / "split.csv")
    assert len(evaluate(out, test, load=load)) == len(test)
    with pytest.raises(SplitError):
        evaluate(out, learned, load=load)
    text = (out.parent / "split.csv").read_text()
    (out / "split.csv").write_text(text.replace(",0\n", ",1\n"))
    with pytest.raises(RunError, match="not the split"):
        evaluate(out, test, load=load)
    (out / "split.csv").write_text("nothing")
    with pytest.raises(RunError, match="no split"):
        evaluate(out, test, load=load)
    for p in tmp_path.rglob("split.csv"):
        p.unlink()
    with pytest.raises(RunError, match="fold_0: keeps no split.csv.*write_split.*unchecked=True"):
        evaluate(out, test, load=load)
    with pytest.warns(UncheckedWarning, match="not known"):
        found = evaluate(out, test, load=load, unchecked=True)
    assert "not known whether" in found.attrs["warnings"][0]


def test_patients_nobody_knows(study, tmp_path):
    "Scans without a patient are refused, or counted in the warning; known ones are looked up"
    cohort, r = study
    train_fold(cohort, 0, r, tmp_path / "r", progress=False, load=load)
    blank = held_out(cohort).assign(patient_id="unknown")
    with pytest.raises(SplitError, match="no patient_id"):
        evaluate(tmp_path / "r", blank, load=load)
    with pytest.warns(UncheckedWarning):
        found = evaluate(tmp_path / "r", blank, load=load, unchecked=True)
    assert f"{len(blank)} of {len(blank)} scans" in found.attrs["warnings"][0]
    mixed = pd.concat([blank, cohort[cohort.fold == 1]])
    with pytest.raises(SplitError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UncheckedWarning)
        evaluate(tmp_path / "r", mixed, load=load, unchecked=True)


def test_the_split_has_a_seed_of_its_own(study, tmp_path):
    "Another seed of the weights keeps the test set; another seed of the split does not"
    cohort, r = study
    cohort = cohort.drop(columns="fold")
    runs = [
        train(
            cohort, change(r, seed=s), tmp_path / f"{s}{k}", split_seed=k, progress=False, load=load
        )
        for s, k in ((0, 0), (1, 0), (1, 7))
    ]
    tests = [set(x.predictions[x.predictions.part == "test"].scan_id) for x in runs]
    assert tests[0] == tests[1] != tests[2] and len({x.config["split_hash"] for x in runs}) == 2
    assert not same(weights(runs[0].folder), weights(runs[1].folder))
    a, b = (with_folds(cohort, change(r, seed=s)) for s in (0, 5))
    assert a.equals(b) and not a.equals(with_folds(cohort, r, seed=1))


def test_runs_on_batches_of_the_caller_say_what_to_use(whole, tmp_path):
    from covid_ct.phantom.cohort import phantom_cohort

    r = change(
        R,
        model="darnet-none",
        model_kwargs=dict(classes=3, depth=4, width=4),
        epochs=1,
        batch_size=9,
    )
    torch.manual_seed(0)
    fit(build_model(r), blobs(9, 1, 9), blobs(9, 2), r, tmp_path / "r", progress=False)
    with pytest.raises(RunError, match="names no prep.*predict"):
        evaluate(tmp_path / "r", phantom_cohort(3), load=load)


def test_networks_and_samplers_that_do_not_take_their_settings(study, tmp_path):
    cohort, r = study
    for bad, word in (
        (dict(model_kwargs=dict(classes=3, depth=8, wings=2)), "wings"),
        (dict(sampler_kwargs=dict(colour="red")), "colour"),
    ):
        with pytest.raises(RecipeError, match=word):
            train_fold(cohort, 0, change(r, **bad), tmp_path / "r", progress=False, load=load)
        assert not (tmp_path / "r").exists()


def test_folds_that_cannot_be(study, tmp_path):
    cohort, r = study
    with pytest.raises(TrainError, match="no test set"):
        cross_validate(
            split_patients(cohort.drop(columns="fold"), 3, test=0.0),
            r,
            tmp_path / "cv",
            progress=False,
            load=load,
        )
    with pytest.raises(TrainError, match="names no prep"):
        fold_loaders(cohort, 0, R)


def painted(n, seed, size=4):
    "Pictures in which the bright half is the class"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g)
    m = torch.rand(n, 1, 1, generator=g).expand(n, 8, 8) > torch.linspace(0, 1, 8)
    return [
        dict(
            image=(x + m[:, None])[i : i + size],
            mask=m[i : i + size].long(),
            scan_id=[f"s{seed}-{j}" for j in range(i, min(n, i + size))],
            patient_id=[f"p{seed}-{j}" for j in range(i, min(n, i + size))],
        )
        for i in range(0, n, size)
    ]


SEG = change(
    R,
    "test",
    task="segment",
    classes=("background", "thing"),
    loss="segmentation",
    keep="dice",
    lr=5e-2,
    epochs=8,
    milestones=(),
)


def painter(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_the_loop_segments_and_resumes(tmp_path):
    whole = fit(painter(), painted(20, 1), painted(6, 2), SEG, tmp_path / "a", progress=False)
    assert (
        whole.history.valid_dice.max() > 0.9
        and whole.best["valid_dice"] == whole.history.valid_dice.max()
    )
    assert {"dice.png", "history.png"} == {p.name for p in (tmp_path / "a" / "figures").iterdir()}
    assert "Dice thing" in (tmp_path / "a" / "model_card.md").read_text("utf-8")
    stop = Shuffled(painted(20, 1), 12)
    twin = Shuffled(painted(20, 1))
    full = fit(painter(), twin, painted(6, 2), SEG, tmp_path / "b", progress=False)
    fit(painter(), stop, painted(6, 2), SEG, tmp_path / "c", progress=False)
    again = fit(
        painter(),
        Shuffled(painted(20, 1)),
        painted(6, 2),
        SEG,
        tmp_path / "c",
        resume=True,
        progress=False,
    )
    assert told(full).equals(told(again)) and same(weights(tmp_path / "b"), weights(tmp_path / "c"))
    back = predict_batches(
        load_run(tmp_path / "a", model=painter(3)).model, painted(6, 2), SEG.classes, "segment"
    )
    assert np.isclose(dice_of_counts(back), whole.best["valid_dice"])


def test_step_size_falls_by_steps_across_a_resume(tmp_path):
    r = change(R, "test", milestones=(), decay=0.5, decay_every=4)
    a = fit(
        net(), Shuffled(blobs(22, 1)), blobs(9, 2), r, tmp_path / "a", progress=False
    )  # six steps an epoch
    assert a.history.steps.tolist() == [6, 12, 18, 24] and np.allclose(
        a.history.lr, 1e-2 * 0.5 ** np.array([0, 1, 3, 4])
    )
    fit(net(), Shuffled(blobs(22, 1), 9), blobs(9, 2), r, tmp_path / "b", progress=False)
    b = fit(
        net(), Shuffled(blobs(22, 1)), blobs(9, 2), r, tmp_path / "b", resume=True, progress=False
    )
    assert told(a).equals(told(b)) and same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_counts_and_every_reading_of_dice():
    rng = np.random.default_rng(0)
    m, z = rng.integers(3, size=(4, 5, 6, 7)), rng.normal(size=(4, 3, 5, 6, 7))
    m[1] = 0
    t = segment_rows(dict(logits=torch.tensor(z)), dict(mask=torch.tensor(m)), ("bg", "a", "b"))
    f = z.argmax(1)
    for i in range(4):
        for c, k in (("a", 1), ("b", 2)):
            n = (m[i] == k).sum() + (f[i] == k).sum()
            assert np.isclose(dice_rows(t, c)[i], 2 * ((m[i] == k) & (f[i] == k)).sum() / n)
    assert np.isclose(
        dice_of_counts(t, "a", pooled=True),
        2 * ((m == 1) & (f == 1)).sum() / ((m == 1).sum() + (f == 1).sum()),
    )
    assert np.isclose(
        dice_of_counts(t), np.mean([dice_of_counts(t, "a"), dice_of_counts(t, "b")])
    ) and dice_of_counts(t, background=True) != dice_of_counts(t)
    with pytest.raises(PredictionError, match="patient_id"):
        dice_table(t)


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(mask=torch.zeros(2, 4, 4)), "for a mask"),
        (dict(), "has no mask"),
        (dict(mask=torch.full((2, 4, 5), 7)), "mask values"),
        (dict(mask=torch.full((2, 4, 5), -1)), "mask values"),
    ],
)
def test_masks_that_do_not_fit(bad, words):
    with pytest.raises(TaskError, match=words):
        segment_rows(dict(logits=torch.zeros(2, 3, 4, 5)), bad, ("bg", "a", "b"))


def test_keep_fits_the_task():
    with pytest.raises(RecipeError, match="judged by dice"):
        change(SEG, "test", keep="auc")
    with pytest.raises(RecipeError, match="judged by accuracy"):
        change(R, "test", keep="dice")
    with pytest.raises(RecipeError, match="decay_every"):
        change(R, "test", decay_every=-1)


# the grown loop: in the middle of an epoch, averages, parts, engines

RICH = change(
    R,
    "test",
    milestones=(),
    schedule="cosine",
    warmup=3,
    accumulate=2,
    clip=1.0,
    ema=0.8,
    optimizer="sgd",
    lr=5e-2,
)
EVERY = Engine(save_minutes=0)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    return go(tmp_path_factory.mktemp("rich") / "run", r=RICH)


def ends_alike(a, b):
    return (
        told(a).equals(told(b))
        and all(same(weights(a.folder, k), weights(b.folder, k)) for k in ("best", "last"))
        and a.predictions.equals(b.predictions)
    )


def test_saving_at_every_step_changes_nothing(rich, tmp_path):
    assert ends_alike(go(tmp_path / "r", r=RICH, engine=EVERY), rich)
    assert not same(
        weights(rich.folder),
        {
            k[6:]: v
            for k, v in read_tensors(rich.folder / "checkpoints/state.safetensors")[0].items()
            if k.startswith("model.")
        },
    )  # the kept weights are the averaged ones


@pytest.mark.parametrize("step", [1, 8, 12, 23])
def test_resumed_in_the_middle_of_an_epoch(rich, tmp_path, step):
    "An unexpected error after some steps: steps before the last saved one are not taken again"

    class Counted(Shuffled):
        def __iter__(self):
            for b in super().__iter__():
                self.given = getattr(self, "given", 0) + 1
                yield b

    out = tmp_path / "r"
    with pytest.raises(OSError):
        go(out, train=Shuffled(blobs(22, 1), step, OSError), r=RICH, engine=EVERY)
    assert read_tensors(out / "checkpoints/state.safetensors")[1]["steps"] == step
    rest = Counted(blobs(22, 1))
    n = len(rest.batches)
    assert ends_alike(
        go(out, train=rest, r=RICH, resume=True), rich
    ) and rest.given == 4 * n - n * (
        step // n
    )  # the epoch in hand is drawn again, its first steps passed over


@pytest.fixture
def one_thread():
    "A forked child has one thread, and another number of threads adds in another order"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_ten_times_at_random(tmp_path, one_thread):
    "kill -9 between two steps, in a step, in the middle of a write: ten times, each resumed"
    import time

    class Slow(Shuffled):  # so that a quick machine does not end before it is killed
        def __iter__(self):
            for b in super().__iter__():
                time.sleep(0.01)
                yield b

    r, out, rng = change(RICH, "test", epochs=8), tmp_path / "r", random.Random(7)
    state = out / "checkpoints" / "state.safetensors"

    def stamp():
        return state.stat().st_mtime_ns if state.exists() else 0

    for _ in range(10):
        pid = os.fork()
        if not pid:
            try:
                go(out, train=Slow(blobs(22, 1)), r=r, resume="auto", engine=EVERY)
            finally:
                os._exit(0)
        for _ in range(rng.randint(0, 2)):  # let it get on by some states, then by a moment
            before, until = stamp(), time.monotonic() + 60
            while stamp() == before:
                assert time.monotonic() < until, "it writes no states"
                time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it was faster than we: lengthen the run"
    assert (
        0
        < read_tensors(
            max(out.glob("checkpoints/state*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
        )[1]["steps"]
        < 48
    )
    assert ends_alike(go(out, r=r, resume="auto"), go(tmp_path / "whole", r=r))


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_state_costs_the_steps_since_the_one_before(rich, tmp_path, damage):
    out = tmp_path / "r"
    go(out, train=Shuffled(blobs(22, 1), 14), r=RICH, engine=EVERY)
    p = out / "checkpoints/state.safetensors"
    raw = bytearray(p.read_bytes())
    if damage == "cut":
        p.write_bytes(raw[:-100])
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        p.write_bytes(raw)
    if damage == "gone":
        p.unlink()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = fit(
            net(), Shuffled(blobs(22, 1)), blobs(9, 2), RICH, out, resume=True, progress=False
        )
    assert ends_alike(again, rich) and any("is damaged" in str(w.message) for w in seen) == (
        damage != "gone"
    )
    for q in out.glob("checkpoints/state*"):
        q.write_bytes(q.read_bytes()[:-100])
    with warnings.catch_warnings(), pytest.raises(RunError, match="cannot be read"):
        warnings.simplefilter("ignore")
        go(out, r=RICH, resume=True)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_asked_to_stop_it_ends_the_step_and_saves(rich, tmp_path, name):
    class Asks(Shuffled):
        def __iter__(self):
            for i, b in enumerate(super().__iter__()):
                if len(self.epochs) == 2 and i == 2:
                    signal.raise_signal(getattr(signal, name))
                yield b

    run = go(tmp_path / "r", train=Asks(blobs(22, 1)), r=RICH)
    assert (
        run.interrupted
        and read_tensors(run.folder / "checkpoints/state.safetensors")[1]["steps"] == 6 + 3
    )
    assert ends_alike(go(run.folder, r=RICH, resume="auto"), rich)


def test_engines_learn_the_same(tmp_path):
    a, b = (
        go(tmp_path / n, r=R, engine=Engine(**kw))
        for n, kw in dict(plain={}, lean=dict(recompute=True, channels_last=True)).items()
    )
    for k, v in weights(a.folder).items():
        assert torch.allclose(v, weights(b.folder)[k], atol=1e-5), k


def test_the_history_tells_of_the_machine(whole):
    h = whole.history
    assert (
        {"grad_norm", "seconds", "waited", "scans_per_second", "peak_memory_mb"} <= set(h)
        and (h.grad_norm > 0).all()
        and h.waited.between(0, 1).all()
        and (h.peak_memory_mb > 50).all()
    )
    assert set(h) - set(whole.outcome) == {
        "seconds",
        "waited",
        "scans_per_second",
        "peak_memory_mb",
    }


def test_trouble_is_written_down(tmp_path):
    bad = blobs(22, 1)
    bad[3] = dict(bad[3], image=bad[3]["image"] * float("nan"))
    with pytest.raises(TrainError):
        go(tmp_path / "r", train=bad)
    said = json.loads((tmp_path / "r" / "trouble.json").read_text())
    assert (
        "s1-12" in said["where"]
        and said["step"] == 3
        and json.loads((tmp_path / "r" / "config.json").read_text())["status"] == "failed"
    )


def test_a_full_disk_is_seen_before_work(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "covid_ct.train.run_folder.shutil.disk_usage", lambda p: type("U", (), dict(free=10))
    )
    with pytest.raises(RunError, match="GB for its checkpoints"):
        go(tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert told(go(whole.folder, resume="auto")).equals(
        told(whole)
    )  # what is there already needs no room


def test_impossible_batches_are_said(tmp_path, monkeypatch):
    good = blobs(8, 1)
    for i, (bad, words) in enumerate(
        (
            ([1, 2], "is a list without scans"),
            (dict(label=torch.zeros(4)), "without scans"),
            (dict(good[0], image=torch.zeros(0, 1, 4, 6, 6)), "without scans"),
            (dict(good[0], label=torch.tensor([0, 1, 2, 7])), "label 7"),
            (dict(good[0], label=torch.tensor([0, 1])), "do not fit"),
        )
    ):
        with pytest.raises(DataError, match=words):
            go(tmp_path / str(i), train=[bad])

    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainError, match="does not fit into the memory.*accumulate"):
        go(tmp_path / "huge", Huge())
    assert (
        json.loads((tmp_path / "huge" / "trouble.json").read_text())["step"] == 0
        and json.loads((tmp_path / "huge" / "config.json").read_text())["status"] == "failed"
    )


def test_trackers(tmp_path):
    with pytest.raises(TrainError, match="not installed|does not work"):
        go(tmp_path / "r", engine=Engine(trackers=("nothing",)))


def test_tensorboard_is_told_what_the_table_says(tmp_path):
    "Also by a run that was stopped and resumed"
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    engine = Engine(trackers=("tensorboard",))
    with pytest.raises(OSError):
        go(tmp_path / "r", train=Shuffled(blobs(22, 1), 14, OSError), engine=engine)
    run = go(tmp_path / "r", resume="auto", engine=engine)
    said = events.EventAccumulator(str(next((tmp_path / "r").rglob("events.out*")).parent))
    said.Reload()
    for k in ("train_loss", "valid_accuracy", "grad_norm", "lr", "scans_per_second"):
        told = {e.step: e.value for e in said.Scalars(k)}
        assert [*told] == run.history.steps.tolist() and np.allclose(
            [*told.values()], run.history[k]
        ), k


CELLS = (
    """import time, torch
from torch import nn
from covid_ct.train.loop import fit
from covid_ct.train.recipes import change, recipe
class Slow(list):
    def __iter__(self):
        for b in super().__iter__(): time.sleep(.15); yield b
def blobs(n, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%3; x = torch.rand(n,1,4,6,6, generator=g)+.25*y[:,None,None,None,None]
    return Slow(dict(image=x[i:i+4], label=y[i:i+4], scan_id=[f's{i+j}' for j in range(4)],
                     patient_id=[f'p{i+j}' for j in range(4)]) for i in range(0,n,4))
r = change(recipe(), 'lesson', system='toy', name='toy', prep='', model='', model_kwargs={},
           epochs=5, lr=1e-2, milestones=(), augment='none', batch_size=4, keep='loss')""",
    "run = fit(nn.Sequential(nn.Flatten(), nn.Linear(144,3)), blobs(24,1), blobs(12,2), r, 'run')",
    "print('epochs', len(run.history))",
)
lab = test_lab.lab


@pytest.fixture
def training(monkeypatch, request):
    "A JupyterLab with a notebook that trains"
    monkeypatch.setattr(test_lab, "CELLS", CELLS)
    return request.getfixturevalue("lab")


@pytest.mark.slow
def test_the_curves_grow_in_a_notebook(training, browser):
    "One picture, drawn again after each epoch, with its alt text, below a bar that fits"
    page = browser.new_page(viewport={"width": 1200, "height": 1100})
    page.goto(f"{training}/lab/tree/live.ipynb?reset")
    page.wait_for_function(
        """() => {
            const c = window.jupyterapp?.shell.currentWidget?.sessionContext;
            return c?.isReady && c.session?.kernel?.status === "idle";
        }""",
        timeout=60_000,
    )
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    picture, seen, bars = page.locator(".jp-OutputArea-output img"), [], []
    picture.first.wait_for(timeout=120_000)
    while "epochs 5" not in page.locator(".jp-Notebook").inner_text():
        if (alt := picture.first.get_attribute("alt")) not in seen:
            seen.append(alt)
        bars.append(
            page.locator(".jp-OutputArea-output .widget-hbox").evaluate(
                """e => {
                    const w = [...e.querySelectorAll('.widget-html')].at(-1);
                    const right = x => x.getBoundingClientRect().right;
                    return [right(w), right(e), w.innerText];
                }"""
            )
        )
        page.wait_for_timeout(100)
    assert (
        picture.count() == 1 and len(seen) >= 3 and all("over" in a and "epochs" in a for a in seen)
    ), seen
    assert all(right <= edge + 1 for right, edge, _ in bars) and any(
        "loss" in text for *_, text in bars
    )
    if os.environ.get("LAB_SHOT"):
        page.screenshot(path=os.environ["LAB_SHOT"])
    page.close()


def test_recipes_of_last_year_keep_their_names():
    "Fields that came later do not enter the hash unless they are used"
    old = {
        k: v
        for k, v in to_dict(R).items()
        if k not in ("schedule", "warmup", "clip", "accumulate", "ema")
    }
    old["sources"] = {k: v for k, v in old["sources"].items() if k in old}
    assert (
        from_dict(old) == R
        and from_dict(old).hash == R.hash
        and len(
            {
                change(R, "test", **k).hash
                for k in ({}, dict(ema=0.9), dict(clip=1.0), dict(accumulate=2), dict(warmup=3))
            }
        )
        == 5
    )
    assert recipe("darnet", "tiny").hash == "faa912695a7d"
    for bad in (
        dict(ema=1.0),
        dict(clip=-1),
        dict(accumulate=0),
        dict(accumulate=99),
        dict(warmup=0.5),
        dict(schedule="triangle"),
        dict(schedule="cosine"),
    ):
        with pytest.raises(RecipeError):
            change(R, "test", **bad)
