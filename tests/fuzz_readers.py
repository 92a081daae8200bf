"""
Fuzzing of three readers, guided by the coverage of their code (needs `pip install atheris`):

    python tests/fuzz_readers.py pickle -max_total_time=600
    python tests/fuzz_readers.py coco -max_total_time=600
    python tests/fuzz_readers.py mat -max_total_time=600

The other arguments are libFuzzer's. A reader returns images whose rows can be built, or raises a documented error.
Anything else stops the run, and the input is saved to a file, whose name as an argument tries it again.
"""

import inspect
import io
import logging
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import atheris
import numpy as np
from data_layouts import SIZE, write_coco, write_refer
from hypothesis import given, strategies as st
from scipy.io import loadmat, matlab, savemat
from test_reader_properties import SEGMENTATIONS, attempt, check_coco, check_rows, damaged

from modeling_restr.data import canonical, coco, coco_file, expressions, records, refer, segmentation
from modeling_restr.data.referit import MASK_KEY, load_mask


Target = tuple[Callable[[bytes], None], list[bytes]]  # what reads an input, and the first inputs


def follow_coverage(*modules: ModuleType) -> None:
    """Have atheris follow all functions and methods of modules."""
    for module in modules:
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for owner in (module, *classes):
            for function in vars(owner).values():
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


def fuzz_pickle(folder: Path) -> Target:
    refs = write_refer(folder, folder / "images", {"val": [1, 2]})
    path = folder / "refs(unc).p"
    follow_coverage(pickle, refer, records, canonical, segmentation)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        images = attempt(refer.read_refer, folder, folder / "images")
        if not isinstance(images, Exception):
            check_rows(images)

    return read, [pickle.dumps(refs, protocol) for protocol in range(6)]


def fuzz_coco(folder: Path) -> Target:
    """Inputs are choices of what is missing, replaced or moved in a valid file."""
    content = write_coco(folder / "instances.json", folder, num_images=4)
    for annotation, form in zip(content["annotations"], SEGMENTATIONS):
        annotation |= {"segmentation": form, "caption": ["the dog", "a dog"], "iscrowd": 0}
    follow_coverage(coco, coco_file, expressions, records, canonical, segmentation)

    @given(damaged(content, max_changes=4), st.booleans(), st.booleans())
    def read(damaged_content: object, captions: bool, crowds_as_instances: bool) -> None:
        check_coco(folder, damaged_content, captions, crowds_as_instances)

    return read.hypothesis.fuzz_one_input, [bytes(200)]


def fuzz_mat(folder: Path) -> Target:
    """The coverage is SciPy's in this process, which reads only what did not crash the reader's own process."""
    path = folder / "1_1.mat"
    follow_coverage(*(module for name, module in vars(matlab).items() if name.startswith("_mio")))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        mask = attempt(load_mask, path)
        if isinstance(mask, np.ndarray):
            np.testing.assert_array_equal(mask, loadmat(path, variable_names=[MASK_KEY])[MASK_KEY] == 0)
        elif "ended with code" not in str(mask):
            with suppress(Exception):
                loadmat(path, variable_names=[MASK_KEY])

    seeds = []
    for options in ({}, {"do_compression": True}, {"format": "4"}, {"oned_as": "row"}):
        for value in (np.ones(SIZE, dtype=np.uint8), np.eye(3), np.array(["ab"]), {"a": 1.0}):
            if options.get("format") == "4" and isinstance(value, dict):
                continue
            buffer = io.BytesIO()
            savemat(buffer, {MASK_KEY: value}, **options)
            seeds.append(buffer.getvalue())
    return read, seeds


def main() -> None:
    make_target = {"pickle": fuzz_pickle, "coco": fuzz_coco, "mat": fuzz_mat}[sys.argv[1]]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read, seeds = make_target(folder)
        (folder / "corpus").mkdir()
        for number, seed in enumerate(seeds):
            (folder / "corpus" / f"{number}").write_bytes(seed)
        arguments = sys.argv[2:]
        if all(argument.startswith("-") for argument in arguments):
            arguments.append(str(folder / "corpus"))
        atheris.Setup([sys.argv[0], *arguments], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
