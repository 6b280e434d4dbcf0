"""Whether the site and the repository are public: one setting, `git_url` in settings.ini.

Empty: links stay within the site or the clone. `https://github.com/OWNER/NAME`: the site is at
https://OWNER.github.io/NAME, functions link to their source, and pages have badges that open them
in Colab and Binder.
"""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def setting(name, root=ROOT):
    "A value of settings.ini"
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"].get(name, "").strip()


def repository(git_url):
    "(owner, name) of a public repository; None where there is none"
    found = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)/?", git_url)
    return found.groups() if found else None


def badges(path, git_url, branch="main"):
    "Markdown that opens a notebook in Colab and Binder; empty where no repository is public"
    public = repository(git_url)
    if not public:
        return ""
    owner, name = public
    colab = f"https://colab.research.google.com/github/{owner}/{name}/blob/{branch}/{path}"
    binder = f"https://mybinder.org/v2/gh/{owner}/{name}/{branch}?labpath={path}"
    return f"[Open in Colab]({colab}) · [Open in Binder]({binder})"
