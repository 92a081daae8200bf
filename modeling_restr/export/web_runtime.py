"""The files of onnxruntime-web, which runs the graphs in a browser: downloaded from npm once, checked and cached."""

import base64
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

from huggingface_hub import cached_assets_path
from huggingface_hub.utils import get_session

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


def get_cache() -> Path:
    """Where the files of this version are kept, in the cache of the Hub's client."""
    return cached_assets_path("modeling_restr", "onnxruntime-web", VERSION)


def copy_runtime(target: Path, runtime_dir: str | os.PathLike | None = None) -> None:
    """
    Write the files and their licence to a new folder.

    Args:
        target (`Path`): The folder.
        runtime_dir (`str` or `os.PathLike`, *optional*):
            The unpacked npm package, its folder dist, or a copy of the cache. By default the cache, which is filled
            from npm's registry when it is empty.

    Raises:
        `ValueError`: `runtime_dir` lacks a file, or the download is not the expected one.
    """
    folder = Path(runtime_dir) if runtime_dir is not None else get_cache()
    if (folder / "dist").is_dir():
        folder /= "dist"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing and runtime_dir is not None:
        raise ValueError(
            f"Expected the files of onnxruntime-web {VERSION} in {folder}, which lacks {', '.join(missing)}. Unpack "
            f"{URL} there."
        )
    if missing:
        _download(folder)
    target.mkdir()
    for name in FILES:
        shutil.copyfile(folder / name, target / name)
    _copy_licence(target)


def _download(folder: Path) -> None:
    response = get_session().get(URL, timeout=600, follow_redirects=True)
    response.raise_for_status()
    found = base64.b64encode(hashlib.sha512(response.content).digest()).decode()
    if found != SHA512:
        raise ValueError(f"Expected a file with the SHA-512 {SHA512} at {URL}, got {found}. Try again.")
    with (
        tarfile.open(fileobj=io.BytesIO(response.content)) as archive,
        replace_files(folder, essential=FILES) as staging,
    ):
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, name
            (staging / name).write_bytes(member.read())


def _copy_licence(target: Path) -> None:
    """npm's package names its licence only. The Python package of the same project holds the text."""
    import onnxruntime

    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        shutil.copyfile(Path(onnxruntime.__file__).with_name(name), target / name)
