"""Fetching with interruptions, the ledger of hashes, conversion, and the manifest."""

import http.server
import json
import threading
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from visionattn import checkpoints
from visionattn.checkpoints import CheckpointError, Ledger, Released, convert, fetch, manifest
from visionattn.cli.main import main

BODY = bytes(range(256)) * 400


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY with ranges; breaks off after `limit` bytes of a response."""

    limit = len(BODY)
    ranges = True
    seen: list[str | None] = []

    def do_GET(self):
        asked = self.headers.get("Range")
        Server.seen.append(asked)
        start = int(asked[6:-1]) if asked and Server.ranges else 0
        if self.path == "/missing.pth":
            self.send_error(404)
            return
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[start : start + Server.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("VISIONATTN_HOME", str(tmp_path / "home"))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Server.limit, Server.ranges, Server.seen = len(BODY), True, []
    entry = Released("toy.in1k", "toy", url=f"http://127.0.0.1:{httpd.server_port}/toy.pth", size=len(BODY))
    entries = {"toy.in1k": entry}

    def use(**changes):
        entries["toy.in1k"] = replace(entry, **changes)

    import sys

    for name in ("visionattn.checkpoints.manifest", "visionattn.checkpoints.fetch"):
        module = sys.modules[name]
        if hasattr(module, "manifest"):
            monkeypatch.setattr(module, "manifest", lambda: entries)
    yield use, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_a_broken_download_goes_on(server, tmp_path):
    Server.limit = 30_000
    folder = tmp_path / "w"
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"broke off after .* run it again"):
            fetch("toy.in1k", folder)
        assert not (folder / "toy.in1k.pth").exists()
    path = fetch("toy.in1k", folder)
    assert path.read_bytes() == BODY
    assert Server.seen == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]
    assert fetch("toy.in1k", folder) == path and len(Server.seen) == 4
    assert [p.name for p in folder.iterdir()] == ["toy.in1k.pth"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    Server.limit = 30_000
    with pytest.raises(CheckpointError):
        fetch("toy.in1k", tmp_path)
    Server.limit, Server.ranges = len(BODY), False
    assert fetch("toy.in1k", tmp_path).read_bytes() == BODY


def test_size_and_hash_are_compared(server, tmp_path):
    use, base = server
    use(size=5)
    with pytest.raises(CheckpointError, match=r"102,400 bytes, 5 are published"):
        fetch("toy.in1k", tmp_path)
    use(sha256="0" * 64)
    with pytest.raises(CheckpointError, match="is manifest"):
        fetch("toy.in1k", tmp_path)
    assert not list(tmp_path.glob("toy*"))
    use(url=f"{base}/missing.pth")
    with pytest.raises(CheckpointError, match="answers 404"):
        fetch("toy.in1k", tmp_path)
    use(url="file:///etc/passwd")
    with pytest.raises(CheckpointError, match="not a web address"):
        fetch("toy.in1k", tmp_path)


def test_the_first_download_is_recorded_and_compared(server, tmp_path):
    path = fetch("toy.in1k", tmp_path)
    assert Ledger().read()["toy.in1k"]["sha256"] == checkpoints.sha256(path)
    path.write_bytes(b"x" + BODY[1:])
    with pytest.raises(CheckpointError, match="is recorded"):
        fetch("toy.in1k", tmp_path)
    Ledger().record("toy.in1k", checkpoints.sha256(path), len(BODY), "trusted by the user")
    assert fetch("toy.in1k", tmp_path) == path


def test_convert_and_load(tmp_path, capsys):
    model = timm.create_model("test_halo", num_classes=7)
    torch.nn.init.normal_(model.fc.weight)
    file = tmp_path / "train.pth"
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    report = convert(file, "test_halo", tmp_path / "out", num_classes=7)
    assert len(report.kept) == len(model.state_dict()) and not report.dropped and not report.computed
    assert report.beside == ("epoch",)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    status = main(["weights", "convert", str(file), "--to", "test_halo", "--num-classes", "7", "--json",
                   "--out", str(tmp_path / "one" / "x.safetensors")])  # fmt: skip
    assert status == 0 and json.loads(capsys.readouterr().out)["out"].endswith("x.safetensors")
    assert torch.equal(load_file(tmp_path / "one" / "x.safetensors")["fc.weight"], model.fc.weight)
    again = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_convert_refuses_what_does_not_fit(tmp_path):
    file = tmp_path / "other.pth"
    torch.save(timm.create_model("test_ulsam").state_dict(), file)
    with pytest.raises(CheckpointError, match="does not fit test_halo"):
        convert(file, "test_halo", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    good = tmp_path / "good.pth"
    torch.save(timm.create_model("test_halo").state_dict(), good)
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(CheckpointError, match="belongs to another model"):
        convert(good, "test_halo", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_convert_reports_renamed_and_dropped(tmp_path):
    state = timm.create_model("test_halo").state_dict()
    attn = "stages.0.0.attn."
    state["extra.table"] = torch.randn(3)
    file = tmp_path / "a.pth"
    torch.save(state, file)
    report = convert(file, "test_halo", strict=False)
    assert report.dropped == ("extra.table",) and f"{attn}q.weight" in report.kept
    assert "dropped   extra.table" in str(report)


def test_manifest_is_true_to_the_registry():
    entries = manifest()
    assert len(entries) > 50
    registered = set(timm.list_models())
    for entry in entries.values():
        assert entry.model is None or entry.model in registered, f"{entry.name} names an unknown model"
        assert entry.url or entry.file or entry.note, f"{entry.name} says nothing of where it is"
        assert entry.url is None or entry.url.startswith("https://")
