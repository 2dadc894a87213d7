"""What is printed is what was given: no brackets swallowed, no line broken."""

import io
import json

from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from engrid.cli.terminal import Terminal
from tests.clusters import engrid, succeeded

HOSTILE = "/tmp/[/b]/[red]x :smile: " + "long " * 40


def test_a_message_is_printed_as_it_is():
    file = io.StringIO()
    terminal = Terminal(file=file, width=80)
    terminal.print(f"checkpoint in {HOSTILE}", style="dim")
    table = Table("token")
    table.add_row("[PAD]")
    terminal.print(table)
    assert file.getvalue().startswith(f"checkpoint in {HOSTILE}\n")
    assert "[PAD]" in file.getvalue()


def test_tokens_in_brackets_and_folders_in_brackets_are_shown(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[/b]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str())), encoding="utf-8")
    shown = succeeded(engrid("ids", "[PAD] [/b] other", "--layer", "1", "--tokenizer", str(path)))
    assert all(f" {token} " in shown for token in ("[PAD]", "[/b]", "[UNK]"))
    folder = tmp_path / "[red]"
    folder.mkdir()
    assert "every byte is as it was written" in succeeded(engrid("checkpoint", "verify", "--folder", str(folder)))
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "manifest.json").write_text("{", encoding="utf-8")
    assert "step-00000001 " in succeeded(engrid("checkpoint", "list", "--folder", str(folder)))
