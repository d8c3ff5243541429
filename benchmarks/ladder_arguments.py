"""The flags of `ladder.py` that say which models there are and where they lie, and what they may not say."""

from pathlib import Path

from ladder_models import BOXES, HELD_OUT, SETS, missing_files, sizes_of
from ladder_table import RESULTS, RUNGS


def add_arguments(parser):
    """Those that choices.py has too."""
    parser.add_argument("--set", choices=list(SETS))
    parser.add_argument("--source_dir", default="")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--init_from", default="", help="ImageNet weights; if left out, what the set's config names")
    parser.add_argument("--runs", default="runs/ladder", help="folder for the workdirs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--steps", type=int, default=0, help="of each training; 0: as in SETS")
    parser.add_argument("--crop", type=int, nargs=2, help="height and width of training crops")
    parser.add_argument("--batch", type=int, default=0, help="images of a training step")
    parser.add_argument("--pair_steps", type=int, default=0, help="of the relations; 0: as in SETS")
    parser.add_argument("--pair_balance", type=float, help="class balance of the relations; as in SETS if left out")
    parser.add_argument("--boxes", choices=list(BOXES), help="of the relations; as in SETS if left out")
    parser.add_argument(
        "--unseen", type=int, default=0, help="percent of the training images that only relations on a unary see"
    )
    parser.add_argument(
        "--ensemble_steps", type=int, default=0, help="of the second unary of the ensemble; 0: those of the first"
    )
    parser.add_argument("--evals", type=int, help="points of each run's curve, on what it is scored on; as in SETS")


def check_arguments(parser, args):
    """Refuses those of `add_arguments` that mean nothing, and fills in those of the set."""
    if not args.set:
        parser.error("--set is needed, or --summary")
    setting = SETS[args.set]
    args.evals = setting.evals if args.evals is None else args.evals
    if not 0 <= args.unseen < 100 - HELD_OUT:
        parser.error(f"--unseen {args.unseen}: 0 to {99 - HELD_OUT}, the pilot holds {HELD_OUT} % out for itself")
    if args.unseen and setting.folds:
        parser.error(f"--unseen {args.unseen}: the folds of {args.set} have no part for it; leave it out")
    if not 0 <= args.ensemble_steps <= sizes_of(args)["steps"]:
        parser.error(f"--ensemble_steps {args.ensemble_steps}: 0 to the {sizes_of(args)['steps']} steps of a unary")
    if min(args.evals, args.steps, args.pair_steps, args.batch) < 0:
        parser.error("--evals, --steps, --pair_steps and --batch are not negative")
    for name in missing_files(args):
        parser.error(f"--{name} {getattr(args, name)!r} does not exist")


def check_run(parser, args):
    """The same of the flags that ladder.py alone has."""
    setting = SETS[args.set]
    args.rungs = args.rungs or [*RUNGS, *(["ensemble"] if setting.folds else [])]
    if setting.folds:
        args.folds = list(range(setting.folds)) if args.folds is None else args.folds
        if bad := [fold for fold in args.folds if not 0 <= fold < setting.folds]:
            parser.error(f"--folds {bad[0]}: {args.set} has folds 0 to {setting.folds - 1}")
        if not 1 <= args.tune_blocks <= setting.blocks:
            parser.error(f"--tune_blocks {args.tune_blocks}: a fold of {args.set} has 1 to {setting.blocks}")
    for flag, wrong in (("folds", args.folds and not setting.folds), ("final", args.final and not setting.folds)):
        if wrong:
            parser.error(f"--{flag} is of sets without split val, such as nyudv2; {args.set} has one")
    if args.curve and setting.folds:
        parser.error(f"--curve scores split val, which {args.set} has not")
