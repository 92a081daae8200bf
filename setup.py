from pathlib import Path

from setuptools import find_packages, setup


EXTRAS = {
    "train": ["accelerate>=1.1", "datasets>=4.0", "evaluate>=0.4", "pycocotools>=2.0.8", "scipy>=1.11"],
    "quality": ["mypy>=1.15", "ruff>=0.12"],
}
EXTRAS["test"] = [*EXTRAS["train"], "parameterized", "pytest>=8.0"]
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="modeling-restr",
    version="0.1.0",
    description="ReSTR, referring image segmentation: a photo and a sentence in, a mask out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
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
    packages=find_packages(include=["modeling_restr", "modeling_restr.*"]),
    python_requires=">=3.11",
    install_requires=[
        "huggingface-hub>=1.0",
        "numpy>=1.26",
        "pillow>=10.0.1",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "torch>=2.6",
        "tqdm>=4.60",
        "transformers>=5.17,<6",
    ],
    extras_require=EXTRAS,
)
