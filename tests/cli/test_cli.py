"""The command line, run in this process on a tiny random model, and once as a user runs it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import keepkv
from keepkv.cli import arguments, main
from keepkv.cli.demo import strip
from keepkv.cli.program import program
from keepkv.core.when import When
from keepkv.errors import KeepKVError, UnknownName

TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs. " * 4


def run(*args: str, code: int = 0, stdin: str | None = None) -> Any:
    result = CliRunner().invoke(program, list(args), input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def random_llama(vocab: int) -> LlamaForCausalLM:
    """Two KV heads in each of two layers, and weights large enough that what is attended to changes the logits."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": vocab}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=0, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random Llama with a tokenizer of single bytes."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i + 1 for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", model_input_names=["input_ids", "attention_mask"]
    )
    tokenizer.save_pretrained(folder)
    random_llama(257).save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("verb", ["demo", "generate", "methods"])
def test_help_shows_examples(verb: str) -> None:
    assert f"keepkv {verb}" in run(verb, "--help").output.split("Examples:")[1]


def test_no_arguments_show_the_verbs() -> None:
    output = CliRunner().invoke(program, []).output
    assert all(verb in output for verb in ("demo", "generate", "methods"))


def test_methods_lists_every_method() -> None:
    listed = json.loads(run("methods", "--json").stdout)
    assert [one["name"] for one in listed] == [info.name for info in keepkv.methods()]
    printed = run("methods").stdout
    assert all(one["name"] in printed for one in listed)


def test_methods_like_another() -> None:
    found = json.loads(run("methods", "--like", "tova", "--json").stdout)
    assert {one["method"] for one in found} == {info.name for info in keepkv.methods()} - {"tova", "full"}
    shared = [one["shared"] for one in found if one["shared"] is not None]
    assert shared == sorted(shared, reverse=True) and 0 < shared[-1] < shared[0] < 1
    assert "leave out the name" in run("methods", "snapkv", "--like", "tova", code=2).stderr


def test_methods_describes_one() -> None:
    described = json.loads(run("methods", "keepkv", "--json").stdout)
    assert described["paper"] and "key" in described["options"]
    assert "threshold" in run("methods", "keepkv").stdout


def test_generate_streams_and_prints_the_receipt(tiny: str, document: str) -> None:
    shown = run("generate", "--model", tiny, "--prompt-file", document, "--budget", "0.5", "--max-new-tokens", "4")
    assert "50% of the tokens" in shown.stdout and "slots per head" in shown.stdout


def test_generate_json_equals_the_library(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt", TEXT, "--budget", "60", "--max-new-tokens", "5")
    found = json.loads(run(*args, "--method", "snapkv", "--option", "window=8", "--json").stdout)
    assert found["receipt"]["options"] == {"window": 8}
    assert found["receipt"]["compressions"] > 0 and found["receipt"]["ratio"] < 0.5
    assert found["receipt"]["seen"] == [len(TEXT) + 4]
    assert len(found["text"]) > 0


def test_generate_reads_stdin(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt-file", "-", "--max-new-tokens", "2", "--json", "--method", "full")
    assert json.loads(run(*args, stdin=TEXT).stdout)["receipt"]["seen"] == [len(TEXT) + 1]


def test_generate_compresses_while_decoding(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt", TEXT, "--budget", "64", "--max-new-tokens", "40", "--json")
    one, many = (
        json.loads(run(*args, "--method", "snapkv", *extra).stdout)["receipt"]
        for extra in ((), ("--option", "when.every=10"))
    )
    assert many["compressions"] > one["compressions"]
    assert sum(many["kept"]["0"][0]) < sum(one["kept"]["0"][0])
    capped = json.loads(run(*args, "-m", "snapkv", "-o", "when.prefill=none", "-o", "when.cap=400").stdout)["receipt"]
    assert not capped["compressions"], "the prompt and 40 tokens fit"
    refused = run(*args, "-m", "snapkv", "-o", "when.cap=80", code=2).stderr
    assert "does not fit under When(cap=80)" in " ".join(refused.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "--prompt", "a", "--method", "snapvk"), ["snapvk", "Did you mean 'snapkv'"]),
        (("generate", "--prompt", "a", "--option", "windw=3"), ["windw", "Did you mean 'window'"]),
        (("generate", "--prompt", "a", "--option", "window"), ["key=value"]),
        (("generate",), ["--prompt TEXT or --prompt-file FILE"]),
        (("generate", "--prompt", "a", "--prompt-file", "b"), ["either"]),
        (("generate", "--prompt-file", "/nowhere/at/all.txt"), ["/nowhere/at/all.txt", "No such file"]),
        (("generate", "--prompt", "a", "--model", "/nowhere/model"), ["/nowhere/model"]),
        (("generate", "--model", "TINY", "--prompt", ""), ["empty"]),
        (("generate", "--model", "TINY", "--prompt", TEXT, "--budget", "1.5"), ["1.5", "share"]),
        (("generate", "--model", "TINY", "--prompt", TEXT, "--budget", "lots"), ["lots", "256MiB"]),
        (("generate", "--model", "TINY", "--prompt", TEXT, "--budget", "2"), ["2 slots", "at least"]),
        (("generate", "--model", "TINY", "--prompt", TEXT, "--budget", "10B"), ["bytes"]),
        (("generate", "--model", "TINY", "--prompt", TEXT, "--device", "warp"), ["warp"]),
        (("generate", "--model", "TINY", "--prompt", TEXT, "--max-new-tokens", "400"), ["316 tokens", "400", "512"]),
        (("generate", "--model", "TINY", "--prompt", "a" * 5_000_000), ["more than", "512"]),
        (("generate", "--model", "TINY", "--prompt", "a", "-b", "9" * 400 + "GiB"), ["budget='999", "256MiB"]),
        (("generate", "--model", "TINY", "--prompt", "a", "-b", "9" * 5000), ["budget='999", "256MiB"]),
        (("generate", "--prompt", "a", "-o", "when.every=x"), ["every='x'", "whole number"]),
        (("generate", "--prompt", "a", "-o", "when=deferred"), ["when.prefill=deferred"]),
        (("generate", "--prompt", "a", "-o", "when.x=3"), ["when.x", "when.every", "when.cap"]),
        (("generate", "--prompt", "a", "-o", "when.evry=3"), ["when.evry", "Did you mean 'when.every'"]),
        (("generate", "--prompt", "a", "-m", "SnapVK:window=8"), ["SnapVK", "Did you mean 'snapkv'"]),
        (("generate", "--prompt", "a", "-b", "150%"), ["150%", "'25%'"]),
        (("generate", "--prompt", "a", "-b", "4XiB"), ["4XiB", "KiB, MiB"]),
        (("generate", "--prompt", "a", "--dtype", "float64"), ["dtype 'float64'", "Did you mean 'float16'"]),
        (("generate", "--model", "TINY", "--prompt", "a", "--chat"), ["chat template", "--chat"]),
        (("generate", "--model", "TINY", "--prompt", "a", "--system", "Be brief."), ["chat template", "--system"]),
        (("generate", "--prompt", "a", "-m", "random", "-o", "seed=x"), ["seed='x'", "whole number"]),
        (("generate", "--prompt", "a", "-o", "seed=" + "9" * 30), ["seed=999", "whole number"]),
        (("generate", "--prompt", "a", "-o", "window=" + "9" * 5000), ["window='999", "whole number"]),
        (("generate", "--prompt", "a", "-o", "window=" + "[" * 100_000), ["window='[[[", "whole number"]),
        (("generate", "--prompt", "a", "-o", "sinks=-3"), ["sinks=-3", "whole number"]),
        (("generate", "--prompt", "a", "-m", "keepkv", "-o", "threshold=NaN"), ["threshold=nan", "finite"]),
        (("generate", "--prompt", "a", "-m", "keepkv", "-o", "score=3"), ["score=3", "Score"]),
        (("generate", "--model", "TINY", "--prompt", "a", "-o", "store=3"), ["store '3'"]),
        (("generate", "--prompt", "a", "--codec", "int3"), ["codec 'int3'", "int4"]),
        (
            ("generate", "--prompt", "a", "--codec", "int4", "--codec-option", "bit=2"),
            ["'bit'", "codec 'int4'", "'bits'"],
        ),
        (("generate", "--prompt", "a", "--codec-option", "bits=2"), ["'codec.bits'", "give codec=NAME"]),
        (("generate", "--prompt", "a", "--select", "cods"), ["'cods'", "codes"]),
        (("generate", "--prompt", "a", "--selected", "8"), ["'selected'", "give select=NAME", "'quest'"]),
        (("generate", "--prompt", "a", "--select", "quest", "--select-option", "pag=2"), ["'pag'", "'page'"]),
        (("eval", "-m", "full:select=quest,selected=0"), ["selected=0"]),
        (("generate", "--prompt", "a", "--codec", "int4", "-o", "codec.bits=3"), ["bits=3", "2, 4, 8"]),
        (("eval", "-m", "snapkv:codec=int4,store=static"), ["'static'", "holds slots as they are"]),
        (("generate", "--model", "TINY", "--prompt", "a", "-o", "calibration=3"), ["3: no such file"]),
        (("eval", "--model", "TINY", "-l", "1000000000"), ["1000000000 tokens", "512"]),
        (("eval", "--items", "1000000000"), ["100000"]),
        (("eval", "--seed", "9" * 30), ["seeds=999", "whole number"]),
        (("eval", "-m", "snapkv:window=x"), ["window='x'", "whole number"]),
        (("fidelity", "-m", "snapkv:window=2.5"), ["window=2.5", "whole number"]),
        (("demo", "-m", "snapkv:window=0"), ["window=0", "whole number"]),
        (("demo", "-m", "keepkv", "-b", "5"), ["5 slots", "at least 36"]),
        (("demo", "-b", "150%"), ["150%", "'25%'"]),
        (("demo", "--document", "/nowhere/text.txt"), ["/nowhere/text.txt"]),
        (("demo", "--question", "Who?"), ["--document"]),
        (("demo", "--method", "keepkv:kye=zip"), ["kye", "Did you mean 'key'"]),
        (("methods", "keepvk"), ["keepvk", "Did you mean 'keepkv'"]),
    ],
)
def test_one_line_and_code_2(args: tuple[str, ...], words: list[str], tiny: str) -> None:
    result = run(*(tiny if arg == "TINY" else arg for arg in args), code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr
    assert not result.stdout.strip()


def test_demo_on_own_text_and_model(tiny: str, document: str) -> None:
    args = ("demo", "--document", document, "--model", tiny, "-q", "Who?", "-q", "What?", "--max-new-tokens", "4")
    args += ("-m", "snapkv", "-m", "keepkv:window=8", "--budget", "0.5")
    found = json.loads(run(*args, "--json").stdout)
    full, *others = found["rows"]
    assert (full["method"], full["right"], full["agreement"], full["kl"]) == ("full", 2, 1.0, 0.0)
    assert [row["method"] for row in others] == ["snapkv", "keepkv:window=8"]
    for row in others:
        assert 0 < row["receipt"]["ratio"] < 0.7 and row["kl"] > 0
        assert 0.4 < sum(row["survival"]) / len(row["survival"]) < 0.6
    printed = run(*args).stdout
    assert "same" in printed and "agree" in printed and "▼" not in printed


def test_demo_as_it_comes() -> None:
    args = ("demo", "--budget", "0.25", "-m", "random", "-m", "keepkv")
    full, by_chance, keepkv_row = json.loads(run(*args, "--json").stdout)["rows"]
    assert full["asked"] == 12 and full["right"] >= 11
    assert keepkv_row["right"] > by_chance["right"] and keepkv_row["kl"] < by_chance["kl"]
    assert all(0.2 < row["receipt"]["ratio"] < 0.27 for row in (by_chance, keepkv_row))
    printed = run(*args).stdout
    assert printed.count("▼") >= 8 and f"{full['right']}/12" in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_demo_says_when_the_document_is_too_long(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 3, encoding="utf-8")
    assert "512" in run("demo", "--document", str(path), "--model", tiny, code=2).stderr


def test_budget_of_everything_changes_nothing(tiny: str, document: str) -> None:
    args = ("demo", "--document", document, "--model", tiny, "--max-new-tokens", "3", "--budget", "1.0", "--json")
    for row in json.loads(run(*args).stdout)["rows"]:
        assert row["agreement"] == 1.0 and row["kl"] < 1e-6 and set(row["survival"]) == {1.0}


def test_the_command_is_installed() -> None:
    """As a user runs it: its own process, its entry point, its exit code."""
    command = Path(sys.executable).with_name("keepkv")
    found = subprocess.run([command, "methods", "nothing"], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "unknown method 'nothing'" in found.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("keepkv.cli.", f"{missing}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=f"needs {missing}.*pip install 'keepkv\\[cli\\]'"):
        main.app()


def test_options() -> None:
    pairs = ["key=zip", "threshold=none", "alpha=0.5", "window=16", "when.every=64", "seed=3"]
    expected = {"key": "zip", "threshold": None, "alpha": 0.5, "window": 16, "seed": 3, "when": When(every=64)}
    assert arguments.options(pairs, "keepkv") == expected
    # What is not given of a schedule stays as the method has it; before, g-kv lost its every=128 here.
    given = arguments.variant("g-kv:when.prefill=deferred")
    assert given.options["when"] == keepkv.When("deferred", every=128) and given.label == "g-kv:when.prefill=deferred"
    once = arguments.variant("g-kv:when.every=none")
    assert once.options["when"] == keepkv.When() and once.label == "g-kv:when.every=none"
    capped = arguments.options(["when.prefill=none", "when.cap=80"], "snapkv")
    assert capped == {"when": When(prefill=None, cap=80)}
    assert arguments.variant("keepkv:key=zip,window=64").label == "keepkv:key=zip,window=64"
    assert arguments.variant("snapkv").label == "snapkv"
    with pytest.raises(UnknownName):
        arguments.variant("keepvk:key=zip")
    with pytest.raises(KeepKVError, match="None"):
        arguments.options(["when.prefill=sometimes"], "keepkv")


def test_a_codec_is_an_option_of_every_method() -> None:
    text = "keepkv2:codec=lloyd-max,codec.bits=2,codec.value_bits=4,store=ragged"
    one = arguments.variant(text)
    assert one.options == {"codec": "lloyd-max", "store": "ragged", "codec_options": {"bits": 2, "value_bits": 4}}
    assert sorted(one.label.partition(":")[2].split(",")) == sorted(text.partition(":")[2].split(","))
    assert arguments.variant("snapkv:codec=none").options == {"codec": "none"}
    assert arguments.variant("snapkv:store=static,store.capacity=64").options["store_options"] == {"capacity": 64}


def test_a_selection_is_an_option_of_every_method() -> None:
    text = "full:codec=int4,select=codes,selected=0.125,select.window=8,codec.bits=8"
    one = arguments.variant(text)
    assert one.options == {
        "codec": "int4", "select": "codes", "selected": 0.125, "select_options": {"window": 8},
        "codec_options": {"bits": 8},
    }  # fmt: skip
    assert sorted(one.label.partition(":")[2].split(",")) == sorted(text.partition(":")[2].split(","))


def test_generate_with_a_selection_says_so(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt", TEXT, "--budget", "100%", "--max-new-tokens", "5", "-m", "full")
    more = ("--select", "quest", "--selected", "8", "--select-option", "measure=1", "--select-option", "page=4")
    assert "quest, 8 slots: " in run(*args, *more).stdout
    found = json.loads(run(*args, *more, "--json").stdout)["receipt"]["selection"]
    assert (found["name"], found["selected"], found["measured"]) == ("quest", 8, 4) and 0 < found["recall"] <= 1


def test_generate_with_a_codec_says_so(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt", TEXT, "--budget", "60", "--max-new-tokens", "5", "-m", "snapkv")
    more = ("--codec", "int4", "--codec-option", "value_bits=8")
    shown = run(*args, *more).stdout
    assert "codec" in shown and "int4 (value_bits=8)" in shown
    found, plain = (json.loads(run(*args, *x, "--json").stdout)["receipt"] for x in (more, ()))
    assert (found["codec"], found["codec_options"]) == ("int4", {"value_bits": 8}) and plain["codec"] == "none"
    assert found["bytes"] < 0.6 * plain["bytes"]


def test_strip() -> None:
    assert strip.cells([1.0, 0.0, 0.5, 0.5], 2) == [0.5, 0.5]
    assert strip.cells([1.0, 0.0, 1.0], 80) == [1.0, 0.0, 1.0]
    assert [strip.cell_of(token, 10, 3) for token in (0, 2, 3, 5, 6, 9)] == [0, 0, 1, 1, 2, 2]
    assert strip.strip([0.0, 1e-4, 0.1, 9 / 64, 0.3, 0.7, 1.0], {}).plain == " ▁▃▃▅▇█"
    marked = strip.strip([0.5, 0.5, 0.5], {1: True, 2: False})
    assert [span.style for span in marked.spans] == ["cyan", "bold green", "bold red"]
    assert strip.pointers({1, 3}, 5).plain == " ▼ ▼ "


def test_generate_takes_a_method_with_options_as_other_verbs_do(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt", TEXT, "-b", "25%", "--max-new-tokens", "2", "--json")
    one = json.loads(run(*args, "-m", "SnapKV:window=8").stdout)
    assert (one["receipt"]["method"], one["receipt"]["options"]) == ("snapkv", {"window": 8})
    assert one["receipt"]["budget"] == 0.25
    assert json.loads(run(*args, "-m", "snapkv", "-o", "WINDOW=8").stdout)["receipt"]["kept"] == one["receipt"]["kept"]


def test_generate_draws(tiny: str) -> None:
    args = ("generate", "--model", tiny, "--prompt", TEXT, "-m", "full", "--max-new-tokens", "12", "--json")

    def text(*more: str) -> str:
        return str(json.loads(run(*args, *more).stdout)["text"])

    plain = text()
    assert text("--temperature", "0") == plain == text("--temperature", "5", "--top-k", "1")
    drawn = text("--temperature", "5", "--top-p", "0.9", "--seed", "1")
    assert drawn != plain and drawn == text("--temperature", "5", "--top-p", "0.9", "--seed", "1")
    assert drawn != text("--temperature", "5", "--top-p", "0.9", "--seed", "2")


def test_generate_reads_in_chunks_and_in_another_dtype(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, torch.dtype]] = []
    stock = LlamaForCausalLM.forward

    def forward(self: Any, *given: Any, **kwargs: Any) -> Any:
        lengths.append((kwargs["input_ids"].shape[1], self.dtype))
        return stock(self, *given, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", functools.wraps(stock)(forward))
    run("generate", "--model", tiny, "--prompt", TEXT, "--max-new-tokens", "2", "--chunk", "100", "--dtype", "bfloat16")
    read = [one for one in lengths if one[0] not in (1, 3)]  # a first forward of 3 tokens looks at the model
    assert read == [(n, torch.bfloat16) for n in (100, 100, 100, len(TEXT) - 300)]


def test_generate_uses_the_chat_template(tiny: str, tmp_path: Path) -> None:
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")

    def seen(*more: str) -> int:
        args = ("generate", "--model", str(tmp_path), "--prompt", TEXT, "-m", "full", "--max-new-tokens", "1", "--json")
        return int(json.loads(run(*args, *more).stdout)["receipt"]["seen"][0]) - len(TEXT)

    assert seen() == seen("--chat") == len("<user>")
    assert seen("--no-chat") == seen("--raw") == 0
    assert seen("--system", "Be brief.") == len("<system>Be brief.<user>")
    args = ("generate", "--model", str(tmp_path), "--prompt", "a", "--system", "b", "--no-chat")
    assert "--no-chat" in run(*args, code=2).stderr


def test_the_reason_why_a_model_is_not_loaded_is_one_whole_line(tiny: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((Path(tiny) / name).read_bytes())
    error = run("generate", "--model", str(tmp_path), "--prompt", "a", code=2).stderr
    assert error.count("\n") == 1 and "tokenizer" in error and not error.strip().endswith(":")


def test_without_a_model_generate_says_who_answers(capsys: Any) -> None:
    result = run("generate", "--prompt", "The passcode is", "-m", "full", "--max-new-tokens", "1")
    assert "--model" in result.stderr and "note" in result.stderr


def test_methods_explains_every_option() -> None:
    for info in keepkv.methods():
        unexplained = [name for name in info.options if not info.meanings[name] or not info.types[name]]
        assert not unexplained, (info.name, unexplained)
        assert "Options:" not in info.doc
    printed = " ".join(run("methods", "SnapKV").stdout.split())
    assert "kernel integer 5 neighbours" in printed and "when.every integer or none none" in printed
    assert "when.cap integer or none none" in printed
    assert json.loads(run("methods", "snapkv", "--json").stdout)["types"]["window"] == "integer"
