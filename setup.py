import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "deepkd_plugin/__init__.py").read_text()).group(1)


class BuildPy(build_py):
    """Takes configs/ and patches/ along into the package, where deepkd_plugin/config/shipped.py finds them."""

    def run(self):
        super().run()
        if self.editable_mode:  # they are beside the package then
            return
        into = Path(self.build_lib, "deepkd_plugin", "_shipped")
        shutil.rmtree(into, ignore_errors=True)  # a build folder keeps files that are gone from here
        for folder, pattern in (("configs", "*.yaml"), ("patches", "*.patch")):
            for file in sorted((HERE / folder).rglob(pattern)):
                to = into / file.relative_to(HERE)
                self.mkpath(str(to.parent))
                self.copy_file(str(file), str(to))


setup(
    name="deepkd_plugin",
    version=VERSION,
    description="DeepKD for mdistiller: decoupled distillation losses with a momentum for each gradient stream",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["deepkd_plugin", "deepkd_plugin.*"]),
    package_data={
        "deepkd_plugin.hosts.builtin": ["defaults.yaml", "weights/*.pt"],
        "deepkd_plugin.study.report": ["published.csv", "page.css"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy",
        "yacs>=0.1.8",
        "PyYAML",
        "tensorboardX>=2.6",
        "tqdm",
        "pillow>=10",
        "matplotlib>=3.8",  # its fonts make glyphs100
        "scipy>=1.11",  # the tests of a table's differences
    ],
    extras_require={
        "mdistiller": ["scipy"],  # mdistiller imports it and does not declare it
        "detection": ["pycocotools"],  # COCO-format sets, AP
        "wandb": ["wandb"],
        "slurm": ["submitit"],
        "test": ["pytest>=8", "pytest-xdist>=3.2", "ruff", "mypy", "types-PyYAML", "submitit", "pycocotools"],
    },
    entry_points={"console_scripts": ["deepkd = deepkd_plugin.commands.cli:entry"]},
    cmdclass={"build_py": BuildPy},
)
