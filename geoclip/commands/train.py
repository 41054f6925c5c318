"""Train a model from a YAML file: --config FILE.yaml [--out FOLDER] [--epochs 20 …]"""


def parser():
    from geoclip import training

    parser = training.config_parser(exit_on_error=True)
    parser.description = "Train a model, or go on with a run that was interrupted."
    parser.add_argument("--out", type=str | None, default=None, help="folder of the run; default: by its hash")
    parser.add_argument("--resume", type=bool, default=True, help="go on with an interrupted run")
    parser.add_argument("--devices", type=int | str, default="auto", help='number of devices, or "auto"')
    parser.add_argument("--accelerator", type=str, default="auto", help='"auto", "cpu" or "gpu"')
    return parser


def run(options) -> int:
    import sys

    from geoclip import training

    config = training.from_namespace(parser(), options)
    run = training.train(
        config,
        options.out,
        resume=options.resume,
        progress=sys.stderr.isatty(),
        devices=options.devices,
        accelerator=options.accelerator,
    )
    result = run.result
    print(f"{result['steps']} steps in {result['seconds']} s; checkpoint {run.checkpoint}")
    print(f"evaluate it with: python -m geoclip evaluate --checkpoint {run.checkpoint}")
    return 0
