import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).parent


def read_constant(name: str, file: str) -> str:
    """Read a string constant of a module without importing it, because that needs what is installed here."""
    text = (ROOT / "modeling_restr" / file).read_text(encoding="utf-8")
    return re.search(rf'^{name} = "(.+?)"', text, re.MULTILINE)[1]


EXTRAS = {
    "train": [
        "accelerate>=1.13",
        "datasets>=4.1",
        "evaluate>=0.4",
        "fsspec>=2023.10",
        "pyarrow>=21.0",
        "pycocotools>=2.0.8",
        "scipy>=1.11",
    ],
    "scale": ["ray[data]>=2.54"],
    "tracking": ["matplotlib>=3.8", "tensorboard>=2.17", "trackio>=0.21.1"],
    "space": ["gradio>=6.31,<7"],
    "onnx": ["onnx>=1.19", "onnxruntime>=1.22", "onnxscript>=0.7"],
    "browser": ["selenium>=4.20"],  # and Chromium with its driver, which pip does not bring
    "quality": ["mypy>=1.15", "ruff>=0.12"],
}
EXTRAS["test"] = [
    *EXTRAS["train"],
    *EXTRAS["onnx"],
    *EXTRAS["scale"],
    *EXTRAS["space"],
    *EXTRAS["browser"],
    "hypothesis>=6.120",
    "ipykernel>=6.29",
    "matplotlib>=3.8",
    "nbclient>=0.10",
    "parameterized",
    "peft>=0.18",
    "psutil>=5.9",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "pyyaml>=6.0",
    "setuptools>=77",
    "tensorboard>=2.17",
]
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})


class BuildWithModelCard(build_py):
    """Copies the template of model cards from the repository's root to the module that fills it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("model_card.md", str(Path(self.build_lib, "modeling_restr", "hub", "model_card.md")))


setup(
    name="modeling-restr",
    version=read_constant("__version__", "__init__.py"),
    description="ReSTR, referring image segmentation: a photo and a sentence in, a mask out",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="referring image segmentation, referring expression, transformer, ReSTR, transformers",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    cmdclass={"build_py": BuildWithModelCard},
    packages=find_packages(include=["modeling_restr", "modeling_restr.*"]),
    package_data={"modeling_restr": ["py.typed", "export/web/*"]},
    python_requires=">=3.11",
    install_requires=[
        "filelock>=3.12",
        "huggingface-hub>=1.0",
        "jinja2>=3.0",
        "numpy>=1.26",
        "packaging>=24.2",
        "pillow>=12.0",
        "safetensors>=0.5",
        "tokenizers>=0.23.3",
        "torch>=2.8",
        "tqdm>=4.60",
        read_constant("TRANSFORMERS", "requirements_restr.py"),
        "typer>=0.29",
    ],
    entry_points={"console_scripts": ["restr = modeling_restr.cli:main"]},
    extras_require=EXTRAS,
)
