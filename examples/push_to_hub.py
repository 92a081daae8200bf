"""
Push a model's folder to the Hub, with everything that a machine without the package needs to run it:

    python examples/push_to_hub.py runs/model you/restr --evaluation runs/evaluation.json --recipe runs/recipe.json \\
        --photo photo.jpg --sentence "the dog on the left" --sentence "ball" --credit "by me, CC BY 4.0" --tag v1

With any option on the card, the folder's README.md is regenerated first; otherwise it is pushed as it is, or, where
there is none, a card that says how to use the model. Results come from evaluation files of these very weights; a
training script leaves one, and its recipe, in its OUTPUT_DIR.
Needs a token that may write: `hf auth login`, or the variable HF_TOKEN.
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from modeling_restr.arguments import ArgumentParser
from modeling_restr.hub import Example, push_to_hub, write_model_card


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Push a model's folder to the Hub.")
    parser.add_argument("folder", type=Path, help="the model's folder")
    parser.add_argument("repo_id", help="the repository, made as needed, such as you/restr")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--tag", help="a name for this state of the repository, such as v1")
    card = parser.add_argument_group("the card")
    card.add_argument("--recipe", type=Path, help="JSON file with the training's settings")
    card.add_argument("--evaluation", type=Path, action="append", default=[], help="JSON file of an evaluation")
    card.add_argument("--training_data", help="what it was trained on, and under which terms (Markdown)")
    card.add_argument("--dataset", action="append", default=[], help="id of such a dataset on the Hub")
    card.add_argument("--base_model", help="id of the model on the Hub that the training started from")
    card.add_argument("--license", help="licence of the weights, such as cc-by-4.0 (default: the card names none)")
    card.add_argument("--limits", help="limits beyond those of every ReSTR (Markdown)")
    card.add_argument("--photo", type=Path, help="a photograph to show the model with; needs the two below")
    card.add_argument("--sentence", action="append", default=[], help="what to find in it; may be given several times")
    card.add_argument("--credit", help="whose photograph it is, and its licence")
    card.add_argument("--space", help="id of a Space that runs the model")
    args = parser.parse_args()
    args.write_card = any(getattr(args, action.dest) != action.default for action in card._group_actions)
    if (args.photo is None) != (not args.sentence) or (args.photo is None) != (args.credit is None):
        parser.error("--photo, --sentence and --credit belong together")
    return args


def write_card(args: argparse.Namespace) -> Path:
    written = args.folder / "README.md"
    if not args.evaluation and written.exists() and ModelCard.load(written).data.eval_results:
        raise ValueError(
            f"{written} has results, and these options would write it without them: pass its evaluation (--evaluation)"
            " and its recipe (--recipe) again, or remove it first."
        )
    return write_model_card(
        args.folder,
        training=None if args.recipe is None else json.loads(args.recipe.read_text(encoding="utf-8")),
        evaluations=args.evaluation,
        data=args.training_data,
        datasets=args.dataset,
        base_model=args.base_model,
        license=args.license,
        limits=args.limits,
        example=None if args.photo is None else Example(args.photo, args.sentence, args.credit),
        space=args.space,
    )


def main() -> None:
    args = parse_args()
    try:
        if args.write_card:
            print(f"Wrote {write_card(args)}")
        commit = push_to_hub(args.folder, args.repo_id, private=args.private, tag=args.tag)
    except (ValueError, OSError, HfHubHTTPError) as error:
        raise SystemExit(str(error)) from error
    print(f"{commit.repo_url} is at {commit.oid}")


if __name__ == "__main__":
    main()
