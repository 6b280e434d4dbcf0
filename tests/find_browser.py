"""The browser of the tests: one that is here, one that can be got, or one line that says how to get
one.

python tests/find_browser.py     prints its path, `none` without one; tries to get one first
COVID_CT_BROWSER=PATH            this one and no other; `none`: none"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
]
APPS = ["Google Chrome", "Chromium", "Microsoft Edge"]
FILES = [
    ("Google", "Chrome", "Application", "chrome.exe"),
    ("Microsoft", "Edge", "Application", "msedge.exe"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
ADVICE = (
    "No Chrome, Chromium or Edge that starts, so the browser tests are skipped. Install one, "
    "or run `python -m playwright install chromium`, or name one in COVID_CT_BROWSER."
)


def places() -> list[Path]:
    "Where macOS and Windows keep browsers"
    apps = [
        Path(home, "Applications", f"{a}.app", "Contents", "MacOS", a)
        for home in ("/", Path.home())
        for a in APPS
    ]
    roots = [os.environ.get(k) for k in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA")]
    return [*apps, *(Path(r, *f) for r in roots if r for f in FILES)]


def of_playwright() -> str | None:
    "The Chromium that Playwright has downloaded; asked in a process of its own"
    code = (
        "from playwright.sync_api import sync_playwright as s\n"
        "with s() as p: print(p.chromium.executable_path)"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    path = r.stdout.strip()
    return path if path and Path(path).is_file() else None


def candidates() -> list[str]:
    "The browsers of this machine, the one to try first in front"
    said = os.environ.get("COVID_CT_BROWSER")
    named = [shutil.which(n) for n in ([said] if said else NAMES)]
    placed = [] if said else [str(p) for p in places() if p.is_file()]
    found = [p for p in (*named, *placed) if p]
    own = None if said else of_playwright()
    return [*found, own] if own else found


@functools.cache
def find_browser() -> str | None:
    "The path of a Chrome, Chromium or Edge of this machine; None without one"
    return next(iter(candidates()), None)


def open_browser(playwright, path: str):
    "The browser at `path`, headless, as the tests use it"
    return playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=60_000)


def starts(path: str) -> bool:
    "Whether a page can be opened in it"
    from playwright.sync_api import Error, sync_playwright

    try:
        with sync_playwright() as p:
            browser = open_browser(p, path)
            browser.new_page().close()
            browser.close()
    except Error:
        return False
    return True


def ways() -> list[list[list[str]]]:
    """Each a list of commands that may bring a browser; apt-get only as root, it asks for no
    password"""
    out = []
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        out.append([["apt-get", "update", "-qq"], install])
    return [*out, [[sys.executable, "-m", "playwright", "install", "chromium"]]]


def attempt(commands: list[list[str]], seconds: float = 300) -> bool:
    "Whether all commands end well, each within some time"
    env = {
        "PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "10000",
        **os.environ,
        "DEBIAN_FRONTEND": "noninteractive",
    }
    try:
        for c in commands:
            subprocess.run(
                c,
                check=True,
                env=env,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def get_browser() -> str | None:
    "One that starts: found, or got in the first way that works; None without one"
    tried = set()
    for commands in ([], *ways()):
        if commands:
            print("No browser yet:", *commands[-1], file=sys.stderr, flush=True)
        if commands and not attempt(commands):
            continue
        for path in candidates():
            if path not in tried and starts(path):
                return path
            tried.add(path)
        if os.environ.get("COVID_CT_BROWSER"):
            break
    return None


def main() -> int:
    path = get_browser()
    print(f"Browser of the tests: {path}" if path else ADVICE, file=sys.stderr, flush=True)
    print(path or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
