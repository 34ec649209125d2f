"""A PATTERN training step of the graph transformer against the same net with message passing as PyTorch Geometric does.

    python benchmarks/graph.py            # about 1 minute on an H100
    python benchmarks/graph.py --batches 8 --repeats 5

The peer is TransformerConv's way in plain PyTorch: queries, keys and values gathered for every edge, a softmax by
scatter (maximum, exponential, sum), messages scattered to their nodes. Where torch_geometric can be imported, its own
softmax and scatter are the peer's. Projections, norms, feed-forward, loss and optimizer are the same code; outputs
agree before anything is timed. Peers run in turns within one process; times are medians of whole steps (gathered batch,
forward, loss, backward, Adam). Writes benchmarks/results/graph-<device>-torch<version>.csv (or --out).
"""

import argparse
import csv
import re
import statistics
import time
from pathlib import Path

import torch

from visionattn.layers import graph_transformer
from visionattn.ops.graph import graph_attention
from visionattn.training.graph.data import gather_batch, generate
from visionattn.training.graph.engine import GraphTrainer, TrainConfig, net_forward, weighted_loss

try:
    from torch_geometric.utils import scatter
    from torch_geometric.utils import softmax as edge_softmax

    PEER = "torch_geometric's softmax and scatter"

    def add(messages: torch.Tensor, dst: torch.Tensor, n: int) -> torch.Tensor:
        return scatter(messages, dst, dim=0, dim_size=n, reduce="sum")

except ImportError:
    PEER = "TransformerConv-style, plain PyTorch"

    def edge_softmax(logits: torch.Tensor, dst: torch.Tensor, num_nodes: int) -> torch.Tensor:
        index = dst[:, None].expand_as(logits)
        most = logits.new_zeros(num_nodes, logits.shape[1]).scatter_reduce(
            0, index, logits.detach(), "amax", include_self=False
        )
        w = (logits - most.index_select(0, dst)).exp()
        total = logits.new_zeros(num_nodes, logits.shape[1]).scatter_add(0, index, w) + 1e-16
        return w / total.index_select(0, dst)

    def add(messages: torch.Tensor, dst: torch.Tensor, n: int) -> torch.Tensor:
        index = dst[:, None, None].expand_as(messages)
        return messages.new_zeros(n, *messages.shape[1:]).scatter_add(0, index, messages)


def message_passing(q, k, v, graph, e=None, backend="auto"):
    """What takes graph_attention's place: every edge's query, key, value and message in memory."""
    q_i, k_j, v_j = q.index_select(0, graph.dst), k.index_select(0, graph.src), v.index_select(0, graph.src)
    alpha = edge_softmax((q_i * k_j).sum(-1) * q.shape[-1] ** -0.5, graph.dst, num_nodes=graph.num_nodes)
    return add(v_j * alpha[..., None], graph.dst, graph.num_nodes), None


class attention_is:
    """Exchanges the operator of every layer, for one block of code."""

    def __init__(self, operator):
        self.operator = operator

    def __enter__(self):
        graph_transformer.graph_attention = self.operator

    def __exit__(self, *_):
        graph_transformer.graph_attention = graph_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="different batches of a turn")
    parser.add_argument("--repeats", type=int, default=7, help="turns; the median counts")
    parser.add_argument("--out", default="")
    parser.add_argument("--compile", action="store_true", help="also time captured steps with compiled updates")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    size = 26
    data = generate("pattern", sizes=(size * args.batches, size, size))
    base = dict(dataset="pattern", batch_size=size, device=device.type)
    trainer = GraphTrainer(TrainConfig(**base, capture=False), data)

    agree(trainer)
    order = trainer._order("train", None)
    totals = torch.stack(trainer._totals("train", order), 1).tolist()
    signs, sums = torch.ones(2, device=device), torch.zeros(2, device=device)
    order = order.to(device)

    def plain_turn() -> None:
        trainer.net.train()
        for ids, total in zip(order, totals, strict=True):
            trainer._step("train", ids, signs, tuple(total), False, sums)

    ways = {PEER: (message_passing, plain_turn), "visionattn": (graph_attention, plain_turn)}
    if device.type == "cuda":
        variants = {"visionattn, captured": False} | ({"visionattn, captured, compiled": True} if args.compile else {})
        for name, compiled in variants.items():
            captured = GraphTrainer(TrainConfig(**base, capture=True, compile=compiled), data)
            ways[name] = (graph_attention, lambda captured=captured: captured._run("train", None))
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory = {}
    for turn in range(args.repeats + 2):
        for name, (operator, run) in ways.items():
            with attention_is(operator):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    memory[name] = torch.cuda.max_memory_allocated() / 2**20
                if turn >= 2:
                    times[name].append((time.perf_counter() - start) / args.batches * 1e3)
    peer = statistics.median(times[PEER])
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows = [
        {
            "way": name, "ms a step": round(statistics.median(t), 3),
            "peer over this": round(peer / statistics.median(t), 2),
            "peak MiB": round(memory.get(name, 0)), "nodes": round(sum(n for n, _ in totals) / len(totals)),
            "edges": round(sum(m for _, m in totals) / len(totals)), "device": gpu, "torch": torch.__version__,
        }
        for name, t in times.items()
    ]  # fmt: skip
    label = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    out = Path(args.out or f"benchmarks/results/graph-{label}-torch{torch.__version__.split('+')[0]}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(" | ".join(f"{k} {v}" for k, v in row.items()))


def agree(trainer: GraphTrainer) -> None:
    """The first batch: outputs and gradients of both ways, within float32's rounding through ten layers."""
    ids = trainer._order("train", None)[0].to(trainer.device)
    nodes, edges = (int(t[0]) for t in trainer._totals("train", trainer._order("train", None)))
    results = []
    for operator in (message_passing, graph_attention):
        batch = gather_batch(trainer.data["train"], ids, nodes, edges, False)
        trainer.net.zero_grad()
        trainer.net.eval()
        with attention_is(operator):
            scores = net_forward(trainer.net, batch)
        weighted_loss(scores, batch.label).backward()
        results.append((scores.detach(), trainer.net.layers[0].attention.K.weight.grad.clone()))
    trainer.net.zero_grad()
    for ours, peer in zip(*results, strict=True):
        error = ((ours - peer).norm() / peer.norm()).item()
        assert error < 1e-4, f"the peers disagree by {error:.1e}: nothing is timed"


if __name__ == "__main__":
    main()
