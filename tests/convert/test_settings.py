"""Data, perplexity, configuration, and what all stages have in common."""

import io
import math
import re

import accelerate
import pytest
import torch
from helpers import tiny_models
from helpers.training import tiny, token_rows
from rich.console import Console
from tokenizers import processors

import lolcats_ops as lo
from lolcats_ops.convert import ConversionConfig, FinetuneConfig, TransferConfig, files
from lolcats_ops.convert.files import replacing, replacing_files


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_a_model_keeps_its_mode(model, training, stage):
    def fail(*_):
        raise RuntimeError("no")

    model.train(training)
    done = stage(model, token_rows(1, 40))
    assert getattr(done, "model", model).training == training
    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        stage(model, token_rows(1, 40))
    assert {module.training for module in model.modules()} == {training}


def test_perplexity_is_that_of_the_loss(model):
    rows = token_rows(3, 40)
    with torch.no_grad():
        expected = math.exp(model.eval()(rows, labels=rows).loss)
    assert lo.convert.evaluate(model, rows, batch_size=2) == pytest.approx(expected, rel=1e-4)


def test_config_round_trips_through_yaml(tmp_path):
    config = ConversionConfig(
        lolcats=lo.hf.LolcatsConfig(window=32, softmax_layers=(1,)),
        transfer=TransferConfig(rounds=3),
        finetune=FinetuneConfig(target_modules=("q_proj",)),
    )
    config.save(tmp_path / "c.yaml")
    assert ConversionConfig.load(tmp_path / "c.yaml") == config
    ConversionConfig().save(tmp_path / "d.yaml")
    assert ConversionConfig.load(tmp_path / "d.yaml") == ConversionConfig()
    (tmp_path / "e.yaml").write_text("transfer:\n  # epochs: 2\n")
    assert ConversionConfig.load(tmp_path / "e.yaml") == ConversionConfig()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("transfer: {epoch: 1}", r": transfer\.epoch: Extra inputs"),
        ("transfer: {mse: 0, xent: 0}", ": transfer: .* mse and xent are both 0"),
        ("data: {length: 1}", r": data\.length: .* greater than or equal to 2"),
        ("lolcats: {sink: -1}", ": lolcats: .* sink is -1, needs >= 0"),
        ("- transfer", " is a list, needs a mapping"),
        ("transfer", " is a str, needs a mapping"),
        ("''", " is a str, needs a mapping"),
        ("lolcats: [", " is not YAML"),
        (b"\xff\xfa\x00", " is not YAML"),
        ("lolcats: {window: 8}\nlolcats: {sink: 2}", " is not YAML: 'lolcats' is there twice"),
        ("data: {length: 8, length: 9}", " is not YAML: 'length' is there twice"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(content, reason, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"c\.yaml{reason}"):
        ConversionConfig.load(tmp_path / "c.yaml")


def test_changes_come_over_what_a_file_says(tmp_path):
    (tmp_path / "c.yaml").write_text("lolcats: {window: 8, sink: 2}\ntransfer:\n")
    changes = ["lolcats.window=16", "transfer.learning_rate=1e-3", "finetune.target_modules=[q, k]"]
    config = ConversionConfig.load(tmp_path / "c.yaml", changes=changes)
    assert (config.lolcats.window, config.lolcats.sink) == (16, 2)
    assert config.transfer.learning_rate == 1e-3
    assert config.finetune.target_modules == ("q", "k")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("window=8", r": needs section\.name=value"),
        ("lolcats.window", r": needs section\.name=value"),
        ("lolcats.=8", r": needs section\.name=value"),
        ("transfer.seed=2001-13-01", " is not YAML: month"),
        ("lolcats.window=[", " is not YAML"),
        ("lolcat.window=8", ": lolcat: Extra inputs"),
        ("lolcats.window=wide", ": lolcats: .*window"),
    ],
)
def test_a_change_that_is_wrong_is_named(change, reason):
    with pytest.raises(ValueError, match=f"^--set {re.escape(change)}{reason}"):
        ConversionConfig.load(changes=[change])


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_data_of_a_wrong_shape_is_refused(model, stage):
    with pytest.raises(ValueError, match=r"data is \[5\], needs \[N, T\]"):
        stage(model, torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("stage", [lo.convert.finetune, lo.convert.evaluate])
def test_rows_of_one_token_predict_nothing(model, stage):
    with pytest.raises(ValueError, match=r"data is \[3, 1\], needs \[N, T\] with .* T >= 2"):
        stage(model, token_rows(3, 1))


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_data_that_are_no_tokens_of_the_model_are_refused(model, stage):
    rows = token_rows(2, 40)
    for data, kind in ((rows.tolist(), "a list"), (rows.float(), "float32"), (rows > 0, "bool")):
        with pytest.raises(TypeError, match=f"data is .*{kind}, needs an integer tensor"):
            stage(model, data)
    for wrong, bounds in ((97, "0 to 97"), (-1, "-1 to 96")):
        rows[0, 0], rows[0, 1], rows[0, 2] = wrong, 0, min(96, abs(wrong) * 96)
        with pytest.raises(ValueError, match=f"ids from {bounds}, the model's vocabulary 97"):
            stage(model, rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_token_rows_have_any_integer_dtype(model, dtype):
    rows = token_rows(1, 40)
    expected = lo.convert.evaluate(model, rows)
    assert lo.convert.evaluate(model, rows.to(dtype)) == expected


@pytest.mark.parametrize(
    ("texts", "length", "error"),
    [
        ("one string", 2, TypeError),
        (["a b"], 0, ValueError),
        (["a b", None], 2, TypeError),
        (["a b", "half \ud83d of one"], 2, ValueError),
    ],
)
def test_pack_names_what_is_wrong(texts, length, error):
    with pytest.raises(error, match=r"^pack: "):
        lo.convert.pack(texts, None, length)


def test_pack_tokenizes_as_many_texts_as_it_needs(monkeypatch):
    tokenizer = tiny_models.word_tokenizer("a b c")
    texts = ["a b", "b", "c a", "b b b"]
    whole = lo.convert.pack(texts, tokenizer, 2)
    monkeypatch.setattr(lo.convert.data, "BATCH", 4)  # characters
    assert lo.convert.pack(texts, tokenizer, 2).tolist() == whole.tolist()
    seen = []
    count = lambda some, **options: seen.extend(some) or tokenizer(some, **options)  # noqa: E731
    count.eos_token_id, count.bos_token_id = tokenizer.eos_token_id, None
    assert lo.convert.pack(texts, count, 2, sequences=1).tolist() == whole[:1].tolist()
    assert seen == texts[:2]
    with pytest.raises(ValueError, match="sequences is 0"):
        lo.convert.pack(texts, tokenizer, 2, sequences=0)


def test_pack_tokenizes_a_long_text_in_pieces(monkeypatch):
    tokenizer = tiny_models.word_tokenizer("a b c d")
    text = "a b\nc d a\n\nb " + "c" * 30 + " d a b c d"
    whole = lo.convert.pack([text, "a b"], tokenizer, 1)
    seen = []
    monkeypatch.setattr(lo.convert.data, "BATCH", 7)
    count = lambda some, **options: seen.extend(some) or tokenizer(some, **options)  # noqa: E731
    count.eos_token_id, count.bos_token_id = tokenizer.eos_token_id, None
    pieces = lo.convert.pack([text, "a b"], count, 1)
    assert "".join(seen) == text + "a b"
    assert max(map(len, seen)) == 7
    assert seen[:2] == ["a b\n", "c d a\n\n"]
    # A word of 30 characters is not one in pieces of 7; all else is, and so are the ends of texts.
    known = [row for row in whole.tolist() if row != [tokenizer.unk_token_id]]
    assert [row for row in pieces.tolist() if row != [tokenizer.unk_token_id]] == known


def test_pack_begins_texts_as_the_tokenizer_does():
    tokenizer = tiny_models.word_tokenizer("a b c")
    assert lo.convert.pack(["a b", "c"], tokenizer, 5).tolist() == [[2, 3, 0, 4, 0]]
    tokenizer.bos_token = "<unk>"  # which is not asked for
    assert lo.convert.pack(["a b", "c"], tokenizer, 5).tolist() == [[2, 3, 0, 4, 0]]
    template = processors.TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    assert lo.convert.pack(["a b", "c"], tokenizer, 7).tolist() == [[1, 2, 3, 0, 1, 4, 0]]
    tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="no end-of-sequence token"):
        assert lo.convert.pack(["a b", "c"], tokenizer, 5).tolist() == [[1, 2, 3, 1, 4]]


def test_numbers_of_a_bar_stay_whole_in_80_columns(monkeypatch):
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(lo.convert.progress, "console", console)
    with lo.convert.progress.progress("attention transfer", 48000) as bar:
        bar.advance(1234, loss=0.3343)
    line = console.file.getvalue()
    assert "attention transfer" in line
    assert "1234/48000" in line
    assert "left -:--:-- loss 0.3343" in line


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(lo.convert.progress, "console", console)
    monkeypatch.setattr(lo.convert.progress, "LINES_S", 0.0)
    with lo.convert.progress.progress("LoRA", 3) as bar:
        bar.advance(loss=2.5)
        assert "1/3" in console.file.getvalue()
        monkeypatch.setattr(lo.convert.progress, "LINES_S", 60.0)
        bar.advance(loss=2.25)
        bar.advance(loss=2.125)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["2.5", "2.25", "2.125"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="bytes is not UTF-8 text, by its byte 0"):
        lo.convert.read_texts([tmp_path / "bytes"])
    (tmp_path / "texts.json").write_text('[{"text": "one"}]')
    with pytest.raises(ValueError, match=r"texts.json: JSON is read as lines"):
        lo.convert.read_texts([tmp_path / "texts.json"])


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_json_lines_are_texts_of_their_own(tmp_path, suffix):
    path = tmp_path / f"texts.{suffix}"
    path.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": "thr\u2028ee"}\n', encoding="utf-8")
    assert lo.convert.read_texts([path]) == ["one\ntwo", "thr\u2028ee"]
    path.write_text('{"text": "one"}', encoding="utf-8-sig")  # as some editors save it
    assert lo.convert.read_texts([path]) == ["one"]
    for wrong, words in (
        ("{", "line 2 is not JSON"),
        ('["text"]', "line 2 is no object with"),
        ('{"text": "a \\ud83d b"}', r"line 2 has \\ud83d, half of a character"),
    ):
        path.write_text('{"text": "one"}\n' + wrong)
        with pytest.raises(ValueError, match=words):
            lo.convert.read_texts([path])
    path.write_text('{"text": " "}')
    with pytest.raises(ValueError, match="holds no text"):
        lo.convert.read_texts([path])


def test_what_a_stage_cannot_begin_with_is_refused_before_it_trains(model, tmp_path):
    rows = token_rows(2, 32)
    before = lo.hf.attention_layers(model)[0].gate.clone()
    with pytest.raises(FileNotFoundError, match="is in no folder that exists"):
        lo.convert.transfer(model, rows, checkpoint=tmp_path / "no" / "stage1.pt")
    with pytest.raises(TypeError, match="config is a dict, needs a TransferConfig"):
        lo.convert.transfer(model, rows, {})
    with pytest.raises(TypeError, match="config is a TransferConfig, needs a FinetuneConfig"):
        lo.convert.finetune(model, rows, TransferConfig())
    with pytest.raises(ValueError, match="resume=True without an output_dir"):
        lo.convert.finetune(model, rows, resume=True)
    assert torch.equal(lo.hf.attention_layers(model)[0].gate, before)
    config = FinetuneConfig(max_steps=1, merge=False)
    adapted = lo.convert.finetune(model, rows, config).model
    with pytest.raises(ValueError, match="the model has adapters"):
        lo.convert.finetune(adapted, rows, config)


def test_wrappers_of_a_model_are_named(model):
    rows = token_rows(1, 32)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for stage in (lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate):
        with pytest.raises(TypeError, match="model is AveragedModel, needs a PreTrainedModel"):
            stage(averaged, rows)
    with pytest.raises(TypeError, match="restore: model is AveragedModel, needs the PreTrained"):
        lo.hf.restore(averaged)
    with pytest.raises(TypeError, match=r"made by torch\.compile"):
        lo.convert.finetune(torch.compile(model), rows)
    with pytest.raises(ValueError, match="batch_size is 0, needs >= 1"):
        lo.convert.evaluate(model, rows, batch_size=0)


def test_a_text_that_is_named_twice_is_read_twice(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words")
    assert lo.convert.read_texts([path, path]) == ["words", "words"]
    with pytest.raises(TypeError, match="one path, needs a list"):
        lo.convert.read_texts(str(path))
    with pytest.raises(ValueError, match="at least one text"):
        lo.convert.pack([], tiny_models.word_tokenizer("a"), 2)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("lolcats", "window", True),
        ("lolcats", "window", 10**20),
        ("lolcats", "affine", "yes"),
        ("transfer", "batch_size", True),
        ("transfer", "learning_rate", math.inf),
        ("finetune", "seed", -1),
        ("finetune", "seed", 2**33),
        ("finetune", "max_steps", 0),
        ("finetune", "max_steps", True),
        ("finetune", "merge", "yes"),
    ],
)
def test_values_of_a_configuration_are_not_turned_into_others(section, field, value):
    with pytest.raises(ValueError, match=field):
        ConversionConfig(**{section: {field: value}})


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune])
def test_a_stage_trains_under_inference_mode(model, stage):
    with torch.inference_mode():
        assert stage(model, token_rows(2, 32)).losses


def test_rates_may_be_written_as_in_python(tmp_path):
    (tmp_path / "c.yaml").write_text("transfer: {learning_rate: 1e-3}\nfinetune: {warmup: 5E-2}")
    config = ConversionConfig.load(tmp_path / "c.yaml")
    assert (config.transfer.learning_rate, config.finetune.warmup) == (1e-3, 5e-2)


def test_a_perplexity_beyond_a_float_is_infinite(model):
    model.lm_head.weight.data.mul_(1e6)
    assert lo.convert.evaluate(model, token_rows(1, 40)) == math.inf


def test_logits_that_are_not_finite_have_no_perplexity(model):
    model.model.layers[1].mlp.up_proj.weight.data[0] = math.nan
    with pytest.raises(RuntimeError, match="evaluate: the model's logits are not finite"):
        lo.convert.evaluate(model, token_rows(1, 40))


def test_an_offloaded_model_is_evaluated_and_not_trained(model):
    rows = token_rows(2, 40)
    expected = lo.convert.evaluate(model, rows)
    accelerate.cpu_offload(model)
    assert lo.convert.evaluate(model, rows) == pytest.approx(expected)
    for stage in (lo.convert.transfer, lo.convert.finetune):
        with pytest.raises(ValueError, match=r"parameters are offloaded .*, where nothing trains"):
            stage(model, rows)
    with pytest.raises(ValueError, match=r"its layers \[0, 1\] are offloaded"):
        lo.hf.convert(accelerate.cpu_offload(tiny()))


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_a_sharded_model_is_refused(model, stage):
    model.lm_head.weight.placements = ()  # as of a DTensor
    with pytest.raises(ValueError, match=rf"{stage}: the model is sharded \(DTensor\)"):
        getattr(lo.convert, stage)(model, token_rows(1, 40))


def test_processes_that_write_the_same_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "file") as first:
        first.write(b"first")
        with replacing(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_killed_processes_left_half_written_is_deleted(kind, tmp_path, monkeypatch):
    def write():
        if kind == "folder":
            return replacing_files(tmp_path)
        return replacing(tmp_path / "file")

    left = tmp_path / {"file": "file.1f.partial", "folder": ".new-1f"}[kind]
    left.mkdir() if kind == "folder" else left.write_bytes(b"half")
    other = tmp_path / "files.1f.partial"
    other.write_bytes(b"another's")
    monkeypatch.setattr(files, "NEW", -1.0)
    with write():
        assert not left.exists()
        being_written = set(tmp_path.iterdir())
        with write():  # which another process has locked
            assert being_written < set(tmp_path.iterdir())
    assert other.exists()
    monkeypatch.setattr(files, "NEW", 60.0)
    left.mkdir() if kind == "folder" else left.write_bytes(b"half")
    with write():
        assert left.exists()  # it may not be locked yet
