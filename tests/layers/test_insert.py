"""``visionattn.insert``: where modules go, what they cost, and that nothing is half done."""

import copy

import pytest
import timm
import torch

import visionattn


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


@pytest.mark.parametrize(
    "name, module, at, count, params, first",
    [
        # the counts of ELA's own hosts (spec tables), reached through timm's networks
        ("resnet18", "ela_b", "conv", 8, 11706792, "layer1.0.bn2"),
        ("resnet50", "ela_t", "conv", 16, 25583464, "layer1.0.act2"),
        ("resnet50", "ela_b", "block", 16, 25692968, "layer1.0"),
        ("resnet50", "ela_l", "stage", 4, 25779752, "layer1.2"),
        ("mobilenetv2_100", "ela_l", "conv", 16, 3916904, "blocks.1.0.bn2"),
        ("mobilenetv2_100", "ela_b", "conv", 16, 3568808, "blocks.1.0.bn2"),
    ],
)
def test_counts_of_the_published_hosts(name, module, at, count, params, first):
    model = timm.create_model(name, device="meta")
    report = visionattn.insert(model, module, at=at)
    assert len(report.places) == count and report.places[0].path == first
    assert sum(p.numel() for p in model.parameters()) == params
    assert report.params == params - sum(p.numel() for p in timm.create_model(name, device="meta").parameters())


def test_macs_of_resnet50():
    """Spec 1.5: T adds 0.57 M, B 0.80 M, S 4.6 M, L 6.4 M in the blocks of ResNet-50."""
    macs = {v: visionattn.insert(timm.create_model("resnet50", device="meta"), f"ela_{v}").macs for v in "tbsl"}
    assert macs == {"t": 573440, "b": 802816, "s": 4587520, "l": 6422528}


@pytest.mark.parametrize(
    "name, first",
    [
        ("mobilenetv3_small_050", "blocks.0.0.bn1"),
        ("efficientnet_b0", "blocks.1.0.bn2"),
        ("regnety_002", "s1.b1.conv2.bn"),
        ("convnext_atto", "stages.0.blocks.0.norm"),
        ("resnext26ts", "stages.0.0.conv2_kxk.bn"),
    ],
)
@pytest.mark.parametrize("at", ["conv", "block", "stage"])
def test_any_timm_cnn(name, first, at):
    model = build(name)
    before = sum(p.numel() for p in model.parameters())
    report = visionattn.insert(model, "ela_b", at=at, input_size=(3, 64, 96))
    if at == "conv" and name != "mobilenetv3_small_050":
        assert report.places[0].path == first
    out = model(torch.randn(1, 3, 64, 96))
    assert out.shape == (1, 1000) and torch.isfinite(out).all()
    assert sum(p.numel() for p in model.parameters()) == before + report.params
    assert f"{len(report.places)} modules" in str(report)


def test_position_is_after_the_activation():
    """The map that goes into conv3 of a bottleneck is the module's output for act2's."""
    model = build("resnet50")
    x = torch.randn(1, 3, 64, 64)
    plain = {}
    model.layer2[1].act2.register_forward_hook(lambda m, i, o: plain.setdefault("out", o.clone()))
    model.layer2[1].conv1.register_forward_pre_hook(lambda m, i: plain.setdefault("in", i[0].clone()))
    model(x)
    block = copy.deepcopy(model.layer2[1])
    report = visionattn.insert(model, "ela_b", at=lambda name: name == "layer2.1.act2")
    assert [p.path for p in report.places] == ["layer2.1.act2"]
    seen = {}
    model.layer2[1].conv3.register_forward_pre_hook(lambda m, i: seen.setdefault("in", i[0]))
    model.layer2[1](plain["in"])
    module = model.layer2[1].act2.module
    torch.testing.assert_close(seen["in"], module(plain["out"]))
    assert not torch.allclose(seen["in"], plain["out"])
    assert block.act2 is not model.layer2[1].act2


def test_residual():
    x = torch.randn(1, 3, 64, 64)
    for residual in (False, True):
        model = build("resnet18")
        visionattn.insert(model, "ela_b", residual=residual)
        for p in model.named_parameters():
            if ".gn." in p[0]:
                torch.nn.init.zeros_(p[1])  # gates of 1/2: y = x / 4, or x / 4 + x
        host = model.layer1[0].bn2
        map_ = torch.randn(1, 64, 8, 8)
        expected = host.host(map_) * (1.25 if residual else 0.25)
        torch.testing.assert_close(host(map_), expected)
        assert torch.isfinite(model(x)).all()


def test_state_dicts_from_before_load():
    plain = build("resnet18")
    model = build("resnet18")
    torch.nn.init.ones_(model.layer1[0].bn2.weight)
    visionattn.insert(model, "ela_b")
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".module." in name for name in missing)
    assert torch.equal(model.layer1[0].bn2.host.weight, plain.layer1[0].bn2.weight)
    other = build("resnet18")
    visionattn.insert(other, "ela_b")
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


def test_copies_and_modes():
    model = build("resnet18").to(torch.bfloat16)
    visionattn.insert(model, "ulsam", groups=8)
    assert not any(m.training for m in model.modules())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    assert torch.equal(twin(x), model(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    torch.jit.script(model)


@pytest.mark.parametrize(
    "name, at, count, last",
    [
        ("dla34", "conv", 12, "level5.tree2.bn2"),
        ("dla60", "block", 16, "level5.tree2"),  # its blocks take a shortcut beside the map
        ("repvgg_a0", "conv", 21, "stages.3.0"),  # summed branches end with the block, and the stem is none
        ("mixnet_s", "conv", 15, "blocks.5.2.bn2"),  # joined branches: all of their channels
        ("inception_next_atto", "conv", 12, "stages.3.blocks.1.norm"),
        ("rexnet_100", "stage", 5, "features.15"),  # one list of blocks: a stage is a map size
        ("densenet121", "stage", 4, "features.denseblock4"),
    ],
)
def test_blocks_that_branch_or_stand_in_one_list(name, at, count, last):
    model = timm.create_model(name, device="meta").eval()
    report = visionattn.insert(model, "ela_b", at=at)
    assert (len(report.places), report.places[-1].path) == (count, last)
    assert model(torch.empty(1, *report.input_size, device="meta")).shape == (1, 1000)


def test_a_second_insertion_at_one_place():
    """The network's own file, and one from between the two, still load: to where each belongs."""
    first, both = build("resnet18"), build("resnet18")
    plain = first.state_dict()
    visionattn.insert(first, "ela_b")
    torch.nn.init.constant_(first.layer1[0].bn2.module.gn.bias, 2.0)
    visionattn.insert(both, "ela_b")
    visionattn.insert(both, "ela_b", at=lambda name: name == "layer1.0.bn2")
    place = both.layer1[0].bn2
    for state, missing in ((plain, 24 + 3), (first.state_dict(), 3)):
        result = both.load_state_dict(state, strict=False)
        assert not result.unexpected_keys and len(result.missing_keys) == missing
    assert place.host.module.gn.bias.min() == 2.0 and place.module.gn.bias.max() == 0.0
    assert not both.load_state_dict(both.state_dict()).missing_keys


@pytest.mark.parametrize(
    "name, call, message",
    [
        ("vit_tiny_patch16_224", dict(name="ela_b"), "nothing in VisionTransformer matches at='conv'"),
        ("vit_tiny_patch16_224", dict(name="ela_b", at="block"), "gives no (B, C, H, W) map"),
        ("mambaout_femto", dict(name="ela_b", at="block"), "gives no (B, C, H, W) map"),  # (B, H, W, C)
        ("resnet18", dict(name="ela_b", at=lambda n: False), "nothing in ResNet matches"),
        ("resnet18", dict(name="ela_b", input_size=224), "give (channels, height, width)"),
        ("resnet18", dict(name="ela_b", at="pixel"), "use one of conv, block, stage"),
        ("resnet18", dict(name="halo"), "'halo' is not a channel module"),
        ("resnet18", dict(name="elab"), "did you mean"),
        ("mobilenetv2_100", dict(name="ela_t", strict=True), "got 144"),
        ("resnet18", dict(name="ela_b", at=lambda n: n == "fc"), "gives no (B, C, H, W) map"),
    ],
)
def test_bad_input_leaves_the_model_alone(name, call, message):
    model = timm.create_model(name, device="meta")
    before = list(model.state_dict())
    with pytest.raises(ValueError) as error:
        visionattn.insert(model, **call)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(model.state_dict()) == before


def test_groups_give_way_and_the_report_says_so():
    report = visionattn.insert(timm.create_model("mobilenetv2_100", device="meta"), "ela_t")
    fitted = {p.channels: p.fitted for p in report.places}
    assert fitted[144] == "gn_groups=16" and fitted[96] == "" and "gn_groups=16" in str(report)
