"""Commands that are ended, or whose disk is full or read-only: nothing half written, nothing lost,
no process left behind. Case 18; kill and resume are in tests/preprocess and tests/train too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_files import chest, small_scan, write_nifti
from toys import PREP

from covid_ct.io.read import write_scan
from covid_ct.preprocess.cache import prepare
from covid_ct.scan import DataError

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='signals of a POSIX system')
TESTS = Path(__file__).resolve().parents[1]
RUN = 'import sys; from covid_ct.cli import main; sys.exit(main())'
LIMITED = (
    'import resource, signal, sys\n'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))\n'
    'sys.argv[1:] = sys.argv[2:]\n' + RUN
)


def command(*argv, code=RUN, **how):
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, argv)], capture_output=True, text=True, **how
    )


def cohort(folder, n=3):
    write_nifti(small_scan(), folder / 'a.nii')
    rows = [f'P{i},S{i},covid,a.nii' for i in range(n)]
    (folder / 'c.csv').write_text('patient_id,scan_id,label,path\n' + '\n'.join(rows) + '\n')
    return folder / 'c.csv'


def session(pid):
    "Processes of a session that still run, without tools that only track"
    found = []
    for p in Path('/proc').glob('[0-9]*/stat'):
        try:
            words = p.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if words[3] == str(pid) and words[0] != 'Z':
            found.append(int(p.parent.name))
    return found


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
def test_sigterm_ends_the_children_too(tmp_path):
    "Two workers sleep over a scan each; the parent is told to end, and nothing of it is left"
    csv = cohort(tmp_path, 8)
    slow = (
        'import sys, time, os\nfrom covid_ct.preprocess import cache\n'
        'def sleep(cache, row, masks):\n'
        "    open(os.environ['MARK'] + str(os.getpid()), 'w').close()\n    time.sleep(60)\n"
        'cache._attempt = sleep\n' + RUN
    )
    p = subprocess.Popen(
        [sys.executable, '-c', slow, 'prepare', str(csv), str(tmp_path / 'out')]
        + ['--recipe', 'darnet', '--jobs', '2'],
        env={**os.environ, 'MARK': str(tmp_path / 'mark')},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    until = time.time() + 120
    while len(list(tmp_path.glob('mark*'))) < 2 and p.poll() is None and time.time() < until:
        time.sleep(0.1)
    assert len(session(p.pid)) > 2
    p.terminate()
    out, err = p.communicate(timeout=60)  # a reader of its output does not wait for a child
    assert p.returncode == 143, err
    until = time.time() + 20
    while session(p.pid) and time.time() < until:
        time.sleep(0.1)
    assert session(p.pid) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    "The system refuses more than 6 kB a file"
    scan, out = write_scan(chest(), tmp_path / 'a.nii.gz'), tmp_path / 'out'
    out.mkdir()
    lines = [
        ('lungs', scan, out / 'm.nii'),
        ('inspect', scan, '--report', out / 'r.html'),
    ]
    for argv in lines:
        done = command(6000, *argv, code=LIMITED)
        assert done.returncode == 2 and 'covid-ct: ' in done.stderr, done.stderr
        assert 'written' in done.stderr and list(out.iterdir()) == []


def test_a_full_disk_under_prepare_and_what_comes_after(tmp_path):
    csv, out = cohort(tmp_path), tmp_path / 'out'
    code = LIMITED.replace(
        RUN,
        'from covid_ct.preprocess.cache import prepare\nfrom toys import PREP\n'
        'done = prepare(sys.argv[1], PREP, sys.argv[2], jobs=1, progress=False)\n'
        'print(len(done.failures))',
    )
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    env = {**os.environ, 'PYTHONPATH': paths}
    full = command(1500, csv, out, code=code, env=env)  # a prepared scan has 1,568 bytes
    assert 'File too large' in full.stderr + full.stdout or full.stdout.strip() == '3', full.stderr
    assert not list(out.rglob('*.image.npy')) and not list(out.rglob('.part-*'))
    after = command(10**6, csv, out, code=code, env=env)
    assert after.returncode == 0 and after.stdout.strip() == '0', after.stderr
    assert len(list(out.rglob('*.image.npy'))) == 3


@pytest.mark.skipif(os.name == 'nt', reason='rights of a POSIX system')
@pytest.mark.parametrize('command', ['prepare', 'train'])
def test_a_folder_that_takes_no_files(tmp_path, capsys, command):
    from covid_ct.cli import main

    csv = cohort(tmp_path)
    for out in ('/proc/nothing/here', '/dev/null/x'):
        assert main([command, str(csv), out]) == 2
        assert capsys.readouterr().err.count('\n') == 1
    if os.geteuid() == 0:
        return  # root writes everywhere
    (tmp_path / 'locked').mkdir(mode=0o500)
    assert main([command, str(csv), str(tmp_path / 'locked' / 'x')]) == 2


def test_a_stopped_preparation_goes_on_to_the_bit(tmp_path):
    csv, whole = cohort(tmp_path, 4), tmp_path / 'whole'
    prepare(csv, PREP, whole, jobs=1, progress=False)
    calls = []

    def stops(scan):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return np.ones(scan.shape, bool)

    def stop(*a):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(csv, PREP, tmp_path / 'x', ('lung',), 1, False, lungs=stops)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list((tmp_path / 'x').rglob('.part-*'))
    done = prepare(csv, PREP, tmp_path / 'x', ('lung',), 1, False, lungs=stops)
    assert (done.made, done.found) == (2, 2)
    for a in whole.rglob('*.image.npy'):
        (b,) = (tmp_path / 'x').rglob(a.name)
        assert a.read_bytes() == b.read_bytes()


def test_an_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*a, **k):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(DataError, match='No space left'):
        write_scan(small_scan(), tmp_path / 'a.nii.gz')
    assert list(tmp_path.iterdir()) == []
