"""Build script. Every value comes from settings.ini, which nbdev reads too."""

import json
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_path"]
needs = {
    k: shlex.split(cfg[k + "requirements"])
    for k in ("", "docs_", "dev_", "cluster_", "export_", "seg_")
}


class WithLessons(build_py):
    """The lessons travel inside of the package, without outputs: `covid-ct course` copies them
    out. A clone has them in nbs/"""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        out = Path(self.build_lib, lib, "lessons")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for page in (here / "nbs" / "lessons").glob("[0-9]*.ipynb"):
            nb = json.loads(page.read_text(encoding="utf-8"))
            for c in nb["cells"]:
                c.update(outputs=[]) if c["cell_type"] == "code" else None
            (out / page.name).write_text(
                json.dumps(nb, indent=1, ensure_ascii=False), encoding="utf-8"
            )


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
    **({"url": cfg["git_url"]} if cfg["git_url"] else {}),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={
        lib: [
            "py.typed",
            "static/*",
            "static/example/*",
            "static/example/checkpoints/*",
            "weights/*",
        ],
    },
    cmdclass={"build_py": WithLessons},
    install_requires=needs[""],
    extras_require={
        "docs": needs["docs_"],
        "cluster": needs["cluster_"],
        "export": needs["export_"],
        "seg": needs["seg_"],
        "dev": needs["docs_"]
        + needs["dev_"]
        + needs["cluster_"]
        + needs["export_"]
        + needs["seg_"],
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
)
