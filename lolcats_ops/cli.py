"""The command `lolcats`: convert a model, train it in two stages, evaluate and run it."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"lolcats: {error}: pip install 'lolcats_ops[hf]'") from error

# Heavy imports happen inside the commands: `lolcats --help` must not load torch.

EXAMPLES = """
Linearize a model with two commands:

    lolcats transfer HuggingFaceTB/SmolLM2-135M out/stage1 --text book.txt

    lolcats finetune out/stage1 out/stage2 --text book.txt

Then look at what it can do:

    lolcats eval out/stage2 --text other.txt

    lolcats generate out/stage2 "The meaning of life is"

Exit codes: 0 done, 1 it failed (the reason is on stderr), 2 wrong usage.
"""

app = typer.Typer(
    help="Linearize pretrained language models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()

ModelPath = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub id of a transformers model.")
]
OutPath = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write the model to.", file_okay=False)
]
TextFiles = Annotated[
    list[Path],
    typer.Option(
        "--text",
        help='UTF-8 text, or JSON lines (.jsonl) with a "text" each; repeat for several files.',
        exists=True,
        dir_okay=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML, see `lolcats info --config`; what it lacks is as in MODEL's lolcats.yaml.",
        exists=True,
        dir_okay=False,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.NAME=VALUE",
        help="One setting, as lolcats.window=128, over what --config says; repeat for several.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ...; by default the GPU if there is one."),
]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show:
        import lolcats_ops as lo

        typer.echo(lo.__version__)
        raise typer.Exit


@app.command()
def convert(
    model: ModelPath,
    out: OutPath,
    config: ConfigFile = None,
    changes: Changes = None,
) -> None:
    """Swap a model's attention without training, and save it.

    Example: lolcats convert HuggingFaceTB/SmolLM2-135M out/swapped --set lolcats.window=128
    """
    import lolcats_ops as lo

    from . import _cli_models as models

    settings = models.settings_of(config, changes, model)
    loaded, tokenizer = models.load_whole(model, "cpu")
    lo.hf.convert(loaded, settings.lolcats)
    models.save(out, loaded, tokenizer, settings)
    console.print(f"saved {out}")


@app.command()
def transfer(
    model: ModelPath,
    out: OutPath,
    text: TextFiles,
    config: ConfigFile = None,
    changes: Changes = None,
    device: Device = None,
    resume: Annotated[
        bool, typer.Option(help="Keep a checkpoint in OUT and go on from it.")
    ] = False,
) -> None:
    """Stage 1: convert a model (if it is not yet) and teach its layers to imitate their softmax
    attention.

    Example: lolcats transfer HuggingFaceTB/SmolLM2-135M out/stage1 --text book.txt
    """
    import lolcats_ops as lo

    from . import _cli_models as models
    from .convert.files import make_writable

    settings = models.settings_of(config, changes, model)
    texts = lo.convert.read_texts(text)
    with models.data_parallel(device) as reports:
        loaded, tokenizer = models.load_whole(model, device)
        if not lo.hf.attention_layers(loaded):
            lo.hf.convert(loaded, settings.lolcats)
        settings = models.as_converted(settings, config, changes, loaded)
        rows = lo.convert.pack(texts, tokenizer, settings.data.length)
        make_writable(out, models.bytes_of(loaded))
        checkpoint = out / "transfer.pt" if resume else None
        report = lo.convert.transfer(loaded, rows, settings.transfer, checkpoint=checkpoint)
        if not reports:
            return
        models.save(out, loaded, tokenizer, settings)
    first, last = (sum(layer[i] for layer in report.losses) / len(report.losses) for i in (0, -1))
    console.print(f"saved {out}")
    console.print(
        f"mean loss over layers {first:.4g} -> {last:.4g}, {report.parameters:,} parameters"
    )


@app.command()
def finetune(
    model: ModelPath,
    out: OutPath,
    text: TextFiles,
    config: ConfigFile = None,
    changes: Changes = None,
    resume: Annotated[
        bool,
        typer.Option(help="Keep checkpoints in OUT (finetune.save_steps) and go on from the last."),
    ] = False,
) -> None:
    """Stage 2: LoRA on the attention projections, merged into the model at the end.

    Example: lolcats finetune out/stage1 out/stage2 --text book.txt
    """
    import lolcats_ops as lo

    from . import _cli_models as models
    from .convert.files import make_writable

    settings = models.settings_of(config, changes, model)
    if not settings.finetune.merge and out.resolve() == Path(model).resolve():
        raise ValueError(
            f"finetune: {out} holds the model, and with merge: false OUT gets an adapter on it; "
            "give another OUT"
        )
    texts = lo.convert.read_texts(text)
    with models.data_parallel(None) as reports:
        loaded, tokenizer = models.load_whole(model, "cpu")  # the Trainer chooses the device
        if not lo.hf.attention_layers(loaded):
            raise ValueError(f"finetune: {model} is not converted; `lolcats transfer` is stage 1")
        settings = models.as_converted(settings, config, changes, loaded)
        rows = lo.convert.pack(texts, tokenizer, settings.data.length)
        make_writable(out, models.bytes_of(loaded) if settings.finetune.merge else 0)
        checkpoints = out / "checkpoints" if resume else None
        report = lo.convert.finetune(
            loaded, rows, settings.finetune, output_dir=checkpoints, resume=resume
        )
        if not reports:
            return
        models.save(out, report.model, tokenizer, settings)
    console.print(f"saved {out}")
    went = "nothing was left to train"
    if report.losses:
        went = f"loss {report.losses[0]:.4g} -> {report.losses[-1]:.4g}"
    console.print(f"{went}, {report.parameters:,} parameters")


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Sample from the likeliest tokens that make up this much."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Sample the same each time.")] = None,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template.")
    ] = False,
    device: Device = None,
) -> None:
    """Continue a prompt, printing tokens as they come.

    Example: lolcats generate out/stage2 "What is a list?" --chat --temperature 0.7 --seed 1
    """
    from transformers import TextStreamer, set_seed

    from . import _cli_models as models
    from .convert.data import token_rows

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    elif top_p < 1 or seed is not None:
        raise ValueError("generate: --top-p and --seed are for sampling: give a --temperature")
    loaded, tokenizer = models.load(model, device)
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(f"generate: {model} has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():  # whether blanks have tokens is the tokenizer's choice
        raise ValueError(f"generate: the prompt {prompt!r} has no tokens")
    token_rows("generate", inputs["input_ids"], loaded)
    models.note_length(model, inputs["input_ids"].shape[1] + max_new_tokens)
    if seed is not None:
        set_seed(seed)
    loaded.generate(
        **inputs.to(loaded.device),
        max_new_tokens=max_new_tokens,
        num_beams=1,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )


@app.command("eval")
def evaluate(
    model: ModelPath,
    text: TextFiles,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 1024,
    sequences: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    device: Device = None,
) -> None:
    """Perplexity of a model on text, on stdout.

    Example: lolcats eval out/stage2 --text other.txt --length 2048
    """
    import lolcats_ops as lo

    from . import _cli_models as models

    texts = lo.convert.read_texts(text)
    loaded, tokenizer = models.load(model, device)
    rows = lo.convert.pack(texts, tokenizer, length, sequences=sequences)
    models.note_length(model, length)
    typer.echo(f"{lo.convert.evaluate(loaded, rows):.4f}")


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to describe.")
    ] = None,
    config: Annotated[
        bool, typer.Option("--config", help="Print the default configuration as YAML.")
    ] = False,
) -> None:
    """Versions, backends and CPU of this installation; or what a converted model is.

    Example: lolcats info --config > lolcats.yaml
    """
    import lolcats_ops as lo

    if config:
        if model is not None:
            raise typer.BadParameter("prints the defaults, of no MODEL", param_hint="--config")
        import yaml

        defaults = lo.convert.ConversionConfig().model_dump(mode="json")
        typer.echo(yaml.safe_dump(defaults, sort_keys=False), nl=False)
        return
    rows: dict[str, object]
    adapter = Path(model) / "adapter_config.json" if model is not None else None
    if adapter and adapter.is_file() and not adapter.with_name("config.json").is_file():
        said = json.loads(adapter.read_bytes())
        rows = {"adapter on": said.get("base_model_name_or_path"), "rank": said.get("r")}
    elif model is not None:
        from transformers import AutoConfig

        from . import _cli_models as models
        from .hf.auto import MODEL_TYPE

        with models.naming(model):
            described = AutoConfig.from_pretrained(model)
        layers = getattr(described.get_text_config(), "num_hidden_layers", "unknown")
        converted = described.model_type == MODEL_TYPE
        rows = {"model type": described.model_type, "layers": layers, "lolcats": "not converted"}
        if converted:
            rows |= {"lolcats": f"of {described.base_model_type}", **described.lolcats}
    else:
        import torch
        import transformers

        from . import _C

        on = {d: lo.backend_for("hybrid_attention", device=d) for d in ("cpu", "cuda")}
        rows = {
            "lolcats_ops": lo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "backends": ", ".join(lo.backends()),
            "on this CPU": on["cpu"].backend or on["cpu"].why,
            "on a GPU": on["cuda"].backend or on["cuda"].why,
            "instruction set": f"{_C.cpu_isa()}, of {', '.join(_C.cpu_isas())}",
            "threads": torch.get_num_threads(),
            "CUDA kernels": "built in" if _C.has_cuda() else "not built in",
        }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)


@app.command(
    add_help_option=False,  # --help is the suite's as well
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Time the operators against their peers; takes the options of `python -m bench`.

    Needs a checkout of the repository, which the suite is a part of, installed for development:
    `make build`, or `pip install --editable '.[bench]'`.

    Example: lolcats bench --case step --budget 0.2
    """
    import lolcats_ops as lo

    # An editable installation, or the current folder.
    checkouts = (Path(lo.__file__).parents[1], Path.cwd())
    checkout = next((c for c in checkouts if (c / "bench" / "cases.py").is_file()), None)
    if checkout is None:
        raise FileNotFoundError(
            "bench: the suite is in the repository, not in the installed package; "
            "run this in a checkout of lolcats_ops, or `make bench` there"
        )
    sys.path.insert(0, str(checkout))
    try:
        suite = importlib.import_module("bench.__main__")
    except ImportError as error:
        raise ImportError(f"bench: {error}; pip install --editable '.[bench]'") from error
    suite.main(context.args, prog="lolcats bench")


# Errors that a user can act on: of Python's kinds, and of those who read the user's files.
USERS_ERRORS = ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError
READERS = ("huggingface_hub", "jinja2", "safetensors")


def main() -> None:
    """Entry point: errors that a user can act on are one line on stderr, without a traceback."""
    # A job that is told to end leaves no half of a model behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except Exception as error:
        reader = type(error).__module__.partition(".")[0]
        if not isinstance(error, USERS_ERRORS) and reader not in READERS:
            raise
        said = " ".join(str(error).splitlines())
        Console(stderr=True).print(f"lolcats: {said}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
