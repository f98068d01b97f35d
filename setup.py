import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "deepkd_plugin/__init__.py").read_text()).group(1)

setup(
    name="deepkd_plugin",
    version=VERSION,
    description="DeepKD for mdistiller: decoupled distillation losses with a momentum for each gradient stream",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["deepkd_plugin", "deepkd_plugin.*"]),
    package_data={"deepkd_plugin.builtin": ["defaults.yaml", "weights/*.pt"]},
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
    ],
    extras_require={"test": ["pytest>=8", "ruff"]},
)
