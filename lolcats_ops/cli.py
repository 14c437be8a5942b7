"""The command `lolcats`: convert a model, train it in two stages, evaluate and run it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"lolcats: {error}: pip install 'lolcats_ops[hf]'") from error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lolcats_ops.convert import ConversionConfig

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
    list[Path], typer.Option("--text", help="UTF-8 text file; repeat for several.", exists=True)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file, see `lolcats info --config`; what it leaves out is as in MODEL's own.",
        exists=True,
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
) -> None:
    """Swap a model's attention without training, and save it.

    Example: lolcats convert HuggingFaceTB/SmolLM2-135M out/swapped --config lolcats.yaml
    """
    import lolcats_ops as lo

    settings = _config(config)
    loaded, tokenizer = _load_whole(model, "cpu")
    lo.hf.convert(loaded, settings.lolcats)
    _save(out, loaded, tokenizer, settings)


@app.command()
def transfer(
    model: ModelPath,
    out: OutPath,
    text: TextFiles,
    config: ConfigFile = None,
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

    settings = _config(config, model)
    loaded, tokenizer = _load_whole(model, device)
    if not lo.hf.attention_layers(loaded):
        lo.hf.convert(loaded, settings.lolcats)
    settings = _as_converted(settings, config, loaded)
    rows = _rows(text, tokenizer, settings)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "transfer.pt" if resume else None
    report = lo.convert.transfer(loaded, rows, settings.transfer, checkpoint=checkpoint)
    _save(out, loaded, tokenizer, settings)
    first, last = (sum(layer[i] for layer in report.losses) / len(report.losses) for i in (0, -1))
    console.print(
        f"mean loss over layers {first:.4g} -> {last:.4g}, {report.parameters:,} parameters"
    )


@app.command()
def finetune(
    model: ModelPath,
    out: OutPath,
    text: TextFiles,
    config: ConfigFile = None,
    resume: Annotated[
        bool, typer.Option(help="Keep checkpoints in OUT and go on from the last.")
    ] = False,
) -> None:
    """Stage 2: LoRA on the attention projections, merged into the model at the end.

    Example: lolcats finetune out/stage1 out/stage2 --text book.txt
    """
    import lolcats_ops as lo

    settings = _config(config, model)
    loaded, tokenizer = _load_whole(model, "cpu")  # the Trainer chooses the device
    if not lo.hf.attention_layers(loaded):
        raise ValueError(f"finetune: {model} is not converted; `lolcats transfer` is stage 1")
    settings = _as_converted(settings, config, loaded)
    rows = _rows(text, tokenizer, settings)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = out / "checkpoints" if resume else None
    report = lo.convert.finetune(
        loaded, rows, settings.finetune, output_dir=checkpoints, resume=resume
    )
    _save(out, report.model, tokenizer, settings)
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
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template.")
    ] = False,
    device: Device = None,
) -> None:
    """Continue a prompt, printing tokens as they come.

    Example: lolcats generate out/stage2 "What is a list?" --chat --temperature 0.7
    """
    from transformers import TextStreamer

    from lolcats_ops.convert.data import token_rows

    loaded, tokenizer = _load(model, device)
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
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    loaded.generate(
        **inputs.to(loaded.device),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
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

    loaded, tokenizer = _load(model, device)
    rows = lo.convert.pack(lo.convert.read_texts(text), tokenizer, length)[:sequences]
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

        typer.echo(yaml.safe_dump(_config(None).model_dump(mode="json"), sort_keys=False), nl=False)
        return
    rows: dict[str, object]
    adapter = Path(model or "") / "adapter_config.json"
    if adapter.is_file() and not adapter.with_name("config.json").is_file():
        said = json.loads(adapter.read_bytes())
        rows = {"adapter on": said.get("base_model_name_or_path"), "rank": said.get("r")}
    elif model is not None:
        from transformers import AutoConfig

        import lolcats_ops.hf  # registers the model type of converted models

        with _naming(model):
            described = AutoConfig.from_pretrained(model)
        layers = getattr(described.get_text_config(), "num_hidden_layers", "unknown")
        rows = {"model type": described.model_type, "layers": layers}
        rows |= getattr(described, "lolcats", None) or {"lolcats": "not converted"}
    else:
        import torch
        import transformers

        from . import _C, dispatch

        choice = lo.backend_for("hybrid_attention")
        rows = {
            "lolcats_ops": lo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "backends": ", ".join(lo.backends()),
            "on this CPU": choice.backend or choice.why,
            "instruction set": f"{_C.cpu_isa()}, of {', '.join(_C.cpu_isas())}",
            "threads": torch.get_num_threads(),
            "CUDA kernels": "built in" if _C.has_cuda() else dispatch.NO_CUDA_KERNELS,
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


def _config(path: Path | None, model: str | None = None) -> ConversionConfig:
    """The settings of a file; those that it does not name are as ``model`` was made with."""
    from lolcats_ops.convert import ConversionConfig

    given = ConversionConfig() if path is None else ConversionConfig.load(path)
    made_with = Path(model or "") / "lolcats.yaml"
    if model is None or not made_with.is_file():
        return given
    return ConversionConfig.load(made_with).updated(given)


def _as_converted(
    settings: ConversionConfig, config: Path | None, model: PreTrainedModel
) -> ConversionConfig:
    """``settings`` with the attention that the model has, which ``config`` must not contradict."""
    import yaml

    from lolcats_ops.hf import LolcatsConfig

    has = LolcatsConfig.from_dict(model.config.lolcats)
    given = yaml.safe_load(config.read_bytes()) or {} if config else {}
    named = {*given.get("lolcats", {})} - {"init", "gate_init"}  # those are of the beginning
    asked = settings.lolcats.to_dict()
    others = [
        f"{name}={value}"
        for name, value in has.to_dict().items()
        if name in named and value != asked[name]
    ]
    if others:
        raise ValueError(
            f"{config} asks for another attention than the converted model has, which is "
            + ", ".join(others)
        )
    return settings.model_copy(update={"lolcats": has})


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors about a model that is no folder say so."""
    if Path(path).is_file():
        raise NotADirectoryError(f"{path} is a file; MODEL is a folder or a hub id")
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise FileNotFoundError(f"{path}: no such folder; and as a hub id: {error}") from error


def _load(path: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on ``device``, None for the GPU if there is one, and its tokenizer.

    Raises:
        ValueError: naming the file that was not written to its end.
        OSError: there is no such folder, nor such a model on the hub.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lolcats_ops.hf  # noqa: F401  registers the model type of converted models
    from lolcats_ops.convert.files import is_whole

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).item()
    except Exception as error:  # a name that is none, or of what this PyTorch lacks
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: this PyTorch finds no such device: {why}") from error
    try:
        with _naming(path):
            model = AutoModelForCausalLM.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        kinds = ("*.safetensors", "*.json", "pytorch_model*.bin")
        files = (file for kind in kinds for file in sorted(Path(path).glob(kind)))
        broken = next((file for file in files if not is_whole(file)), None)
        if broken is None:
            raise
        raise ValueError(f"{broken} is not whole: {error}") from error
    return model.to(device), tokenizer


def _load_whole(path: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same, of a model that is to be changed and saved.

    Raises:
        ValueError: ``path`` is an adapter on a model, of which transformers would save the adapter.
    """
    model, tokenizer = _load(path, device)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{path} is an adapter (PEFT) on {model.name_or_path}; merge it into that first: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
        )
    return model, tokenizer


def _rows(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, settings: ConversionConfig
) -> Tensor:
    from lolcats_ops.convert import pack, read_texts

    return pack(read_texts(paths), tokenizer, settings.data.length)


def _save(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ConversionConfig,
) -> None:
    from lolcats_ops.convert.files import replacing_files

    with replacing_files(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings.save(folder / "lolcats.yaml")
    console.print(f"saved {out}")


def main() -> None:
    """Entry point: errors that a user can act on are one line on stderr, without a traceback."""
    try:
        app()
    except (
        ImportError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        said = " ".join(str(error).splitlines())
        Console(stderr=True).print(f"lolcats: {said}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
