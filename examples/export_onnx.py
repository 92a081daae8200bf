"""
Export a model to ONNX, to run it without PyTorch and Transformers:

    python examples/export_onnx.py examples/restr_mini --output_dir restr-onnx --int8
    python -c 'from restr_onnx import ReSTROnnxPipeline; print(ReSTROnnxPipeline()("photo.jpg", text="the dog on the left"))'

The second command runs in the exported folder, which may be moved anywhere. docs/export.md says what is in it.
"""

import argparse
import logging

from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.arguments import ArgumentParser, add_options
from modeling_restr.export import save_onnx


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Export a model to ONNX: image encoder and sentence query.")
    parser.add_argument("model", help="folder or Hub id")
    add_options(parser, "revision", output_dir={"required": True, "help": "where the graphs and what runs them go"})
    parser.add_argument("--int8", action="store_true", help="also graphs with 8-bit weights, a quarter of the size")
    parser.add_argument("--programs", action="store_true", help="also the torch.export programs (.pt2)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which nothing here uses
    try:
        model = AutoModelForImageSegmentation.from_pretrained(args.model, revision=args.revision)
        processor = AutoProcessor.from_pretrained(args.model, revision=args.revision)
        folder = save_onnx(model, processor, args.output_dir, int8=args.int8, programs=args.programs)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error
    print(f"Wrote {folder}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.stat().st_size / 1e6:8.1f} MB  {path.name}")


if __name__ == "__main__":
    main()
