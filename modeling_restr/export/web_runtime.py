"""The files of onnxruntime-web, which runs the graphs in a browser: downloaded from npm once, checked and cached."""

import base64
import hashlib
import io
import os
import shutil
import tarfile
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from huggingface_hub import cached_assets_path

from ..files import replace_files


VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # npm's integrity
# A build for WebAssembly alone, and two with WebGPU: for browsers with JSPI, and for others.
FILES = (
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    *("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm"),
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
)
# npm's package names its licence only. The Python package of the same project holds the texts.
LICENCES = ("LICENSE", "ThirdPartyNotices.txt")


def find_runtime(runtime_dir: str | os.PathLike | None = None) -> Path:
    """
    Find the folder of the files, and download them on first use.

    Args:
        runtime_dir (`str` or `os.PathLike`, *optional*):
            The unpacked npm package or its folder dist. By default the files are in the cache of the Hub's client.

    Raises:
        `ValueError`: `runtime_dir` lacks a file or is another version, or the download is not the expected one.
        `OSError`: The download failed.
    """
    folder = get_cache() if runtime_dir is None else Path(runtime_dir)
    if (folder / "dist").is_dir():
        folder /= "dist"
    missing = find_missing(folder)
    if missing and runtime_dir is not None:
        raise ValueError(
            f"Expected the files of onnxruntime-web {VERSION} in {folder}, which lacks {', '.join(missing)}. Unpack "
            f"{URL} there."
        )
    if missing:
        _download(folder)
    if f"v{VERSION}" not in (folder / FILES[0]).read_text(encoding="utf-8")[:200]:
        raise ValueError(f"Expected onnxruntime-web {VERSION} in {folder}, got another version. Unpack {URL} there.")
    return folder


def get_cache() -> Path:
    return cached_assets_path("modeling_restr", "onnxruntime-web", VERSION)


def find_missing(folder: Path) -> list[str]:
    """The names of the files that a folder lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def copy_runtime(folder: Path, target: Path) -> None:
    """Copy the files from a folder of `find_runtime` to a new folder, with their licence."""
    import onnxruntime

    target.mkdir()
    for name in FILES:
        shutil.copyfile(folder / name, target / name)
    for name in LICENCES:
        shutil.copyfile(Path(onnxruntime.__file__).with_name(name), target / name)


def _download(folder: Path) -> None:
    try:
        with urlopen(URL, timeout=60) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{URL} could not be downloaded ({error}). Unpack it, and name its folder by --runtime-dir."
        ) from error
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != SHA512:
        raise ValueError(f"Expected a file with the SHA-512 {SHA512} at {URL}, got one with {found}. Try again.")
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as archive,
        replace_files(folder, essential=FILES) as staging,
    ):
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, name
            (staging / name).write_bytes(member.read())
