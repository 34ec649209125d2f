"""The graph kernels on a GPU: errors against float64 at the sizes of PATTERN, bits, compile, CUDA graphs."""

import pytest
import torch

from visionattn.ops.graph import graph_attention, make_graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def problem(N=600, H=8, D=10, share=0.4, dtype=torch.float32):
    torch.manual_seed(0)
    src, dst = (torch.rand(N, N, device="cuda") < share).nonzero(as_tuple=True)
    order = torch.randperm(len(src), device="cuda")
    graph = make_graph(src[order], dst[order], N)
    qkv = (torch.randn(N, 3, H, D, device="cuda") * torch.tensor([3.0, 1, 1], device="cuda")[:, None, None]).to(dtype)
    return graph, qkv, torch.randn(N, H, D, device="cuda").to(dtype)


def run(graph, qkv, grad, backend, dtype):
    leaf = qkv.to(dtype).requires_grad_() if dtype != qkv.dtype else qkv.clone().requires_grad_()
    out, _ = graph_attention(*leaf.unbind(1), graph, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaf, grad.to(dtype))[0].unbind(1)


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("heads, dim", [(8, 10), (1, 64), (6, 32), (4, 160)])
def test_errors(heads, dim, dtype):
    graph, qkv, grad = problem(300 if dim > 10 else 600, heads, dim, dtype=dtype)
    oracle = run(graph, qkv, grad, "reference", torch.float64)
    eager = run(graph, qkv, grad, "reference", dtype)
    fused = run(graph, qkv, grad, "triton", dtype)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), fused, eager, oracle, strict=True):
        assert error(x, z) <= 2 * error(y, z) + 1e-7, f"{name}: {error(x, z):.2e}, eager {error(y, z):.2e}"


def test_same_bits_every_time():
    graph, qkv, grad = problem()
    first = run(graph, qkv, grad, "triton", torch.float32)
    for _ in range(3):
        again = run(graph, qkv, grad, "triton", torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_nothing_in_memory_for_an_edge():
    graph, qkv, grad = problem(2000)
    graph.incoming(), graph.outgoing()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(graph, qkv, grad, "triton", torch.float32)
    assert torch.cuda.max_memory_allocated() - before < 20 * qkv.nbytes < graph.src.numel() * 8 * 10 * 4


def test_padded_training_step_in_a_cuda_graph_learns_as_the_plain_one(tmp_path):
    """The runner of visionattn.training.graph: padding, compiled parts and a captured step change nothing."""
    from visionattn.training.graph.data import generate, statistics
    from visionattn.training.graph.engine import GraphTrainer, TrainConfig

    data = generate("pattern", seed=1, sizes=(24, 4, 4))
    assert statistics(data["train"])["nodes"] > 50
    losses = {}
    for capture in (False, True):
        cfg = TrainConfig(dataset="pattern", net=dict(L=2, hidden_dim=16, out_dim=16), batch_size=8, seed=3,
                          device="cuda", capture=capture, compile=capture)  # fmt: skip
        trainer = GraphTrainer(cfg, data)
        losses[capture] = [trainer.train_epoch()["loss"] for _ in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)


def test_runs_at_once_in_cuda_graphs_learn_as_plain_ones():
    """Two runs on streams of their own: curves, learning rate and evaluation are those of plain steps, one by one."""
    from visionattn.training.graph.data import generate
    from visionattn.training.graph.engine import GraphTrainer, TrainConfig
    from visionattn.training.graph.together import train_together

    data = generate("cluster", seed=1, sizes=(28, 6, 4))

    def trainers(capture):
        common = dict(dataset="cluster", net=dict(L=2, hidden_dim=16, out_dim=16), batch_size=8, lr=1e-2, patience=0,
                      epochs=6, device="cuda", capture=capture)  # fmt: skip
        return [GraphTrainer(TrainConfig(seed=seed, **common), data) for seed in (3, 4)]

    plain, captured = trainers(False), trainers(True)
    for trainer in plain:
        trainer.fit(log=lambda line: None)
    assert train_together(captured) == [True, True]
    for one, other in zip(plain, captured, strict=True):
        # weights 1e-6 apart in the beginning move the validation loss by 4e-3 here, the training loss by 6e-4
        for key, rel in (("train_loss", 5e-3), ("val_loss", 3e-2)):
            assert [row[key] for row in other.history] == pytest.approx([row[key] for row in one.history], rel=rel)
        assert other.evaluate("test")["loss"] == pytest.approx(one.evaluate("test")["loss"], rel=3e-2)
        assert other.evaluate_best("val")["accuracy"] == pytest.approx(other.best["val_accuracy"], abs=0.5)
