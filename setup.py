"""Build script. Every value comes from settings.ini, which nbdev reads too."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_path"]
needs = {k: shlex.split(cfg[k + "requirements"]) for k in ("", "docs_", "dev_", "cluster_", "export_")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    url=cfg["git_url"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: ["static/*"]},
    install_requires=needs[""],
    extras_require={"docs": needs["docs_"], "cluster": needs["cluster_"], "export": needs["export_"],
                    "dev": needs["docs_"] + needs["dev_"] + needs["cluster_"] + needs["export_"]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
