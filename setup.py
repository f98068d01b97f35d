import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "deepkd_plugin/__init__.py").read_text()).group(1)


class BuildPy(build_py):
    """Copy configs/ and patches/ into the package too, for deepkd_plugin/config/shipped.py to find."""

    def run(self):
        super().run()
        if self.editable_mode:  # then they are beside the package
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
    license="MIT",
    license_files=["LICENSE"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2505.15133",
        "mdistiller": "https://github.com/megvii-research/mdistiller",
    },
    keywords=["knowledge distillation", "DeepKD", "mdistiller", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["deepkd_plugin", "deepkd_plugin.*"]),
    package_data={
        "deepkd_plugin": ["py.typed"],
        "deepkd_plugin.hosts.builtin": ["defaults.yaml", "weights/*.pt"],
        "deepkd_plugin.study.report": ["published.csv", "page.css", "page.html", "report.md"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",  # before that its safe loader could run code (CVE-2025-32434, CVE-2026-24747)
        "torchvision>=0.25",
        "numpy",
        "yacs>=0.1.8",
        "PyYAML",
        "tensorboardX>=2.6",
        "pillow>=10",
        "matplotlib>=3.8",  # its fonts make glyphs100
        "scipy>=1.11",  # the tests of a table's differences
        "jinja2>=3.1",  # the page of a table
        "safetensors>=0.4.5",  # students in a form that every framework reads
        "rich>=13",  # the terminal's live view and progress bars
    ],
    extras_require={
        "mdistiller": ["scipy", "tqdm"],  # mdistiller imports them and its setup.py does not say so
        "detection": ["pycocotools"],  # COCO-format sets, AP
        "datasets": ["datasets>=3"],  # DATASET.TYPE huggingface
        "networks": ["timm>=1.0.31"],  # timm:NAME as a teacher or student
        "onnx": ["onnx", "onnxscript", "onnxruntime"],  # deepkd export --to onnx, and running the file
        "hub": ["huggingface_hub"],  # deepkd push
        "tune": ["optuna>=5"],  # brings SQLAlchemy and alembic
        "wandb": ["wandb"],
        "completion": ["shtab>=1.7"],  # deepkd --print-completion; not everybody's shell asks for it
        "slurm": ["submitit"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],  # the site
        "examples": [
            "lightning>=2.6",
            "accelerate>=1.15",
            "transformers>=5.24",
            "timm>=1.0.31",
            "nbclient>=0.10",  # docs/tutorial.ipynb
            "ipykernel",
        ],
        "browser": [
            "playwright>=1.45",
            "axe-playwright-python>=0.1.4",
        ],  # tests of a table's page; Chromium itself is apt's
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.2",
            "hypothesis",
            "expecttest",  # PyTorch's own checks of optimizers import it
            "ruff",
            "mypy",
            "types-PyYAML",
            "submitit",
            "pycocotools",
            "optuna>=5",
            "timm>=1.0.31",
            "datasets>=3",
            "shtab>=1.7",
            "mkdocs>=1.6",  # what is generated of the site
            "pyte",  # what a terminal would show
        ],
    },
    entry_points={"console_scripts": ["deepkd = deepkd_plugin.commands.cli:entry"]},
    cmdclass={"build_py": BuildPy},
)
