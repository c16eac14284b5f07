"""detectron2 is not in ``install_requires``: it is not on PyPI under that name. The README says how to get it."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read ``__version__`` without importing the package, which would need torch and detectron2."""
    tree = ast.parse((ROOT / "d2_headadapt" / "version.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("d2_headadapt/version.py holds no __version__")


README = ROOT / "README.md"

setup(
    name="d2_headadapt",
    version=version(),
    description="Keep what a detectron2 checkpoint knows when the list of classes changes",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["d2_headadapt", "d2_headadapt.*"]),
    package_data={"d2_headadapt": ["adapt/*.csv", "adapt/*.md", "cli/*.css", "cli/*.js"]},
    install_requires=["torch", "fvcore", "iopath", "pycocotools", "matplotlib", "scikit-learn>=1.3"],
    extras_require={
        "demo": ["opencv-python-headless"],
        "files": ["safetensors"],
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "dev": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
            "types-setuptools",
            "types-tabulate",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["d2-headadapt = d2_headadapt.cli:main"]},
)
