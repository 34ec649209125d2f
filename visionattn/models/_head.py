"""The classifier on pooled maps (B, C, H, W) that MAViT, NAT and TransNeXt share; timm's contract around it."""

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from torch import nn


class PooledClassifier(nn.Module):
    """A network whose ``forward_features`` gives (B, ``num_features``, H, W).

    A subclass sets ``num_features``, ``drop_rate`` and calls :meth:`_make_classifier` at the end of its constructor.
    Names are the released files': ``head.weight``, ``head.bias``.
    """

    num_features: int
    drop_rate: float

    def _make_classifier(self, num_classes: int, global_pool: str, dd: dict) -> None:
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self._make_classifier(num_classes, global_pool, get_device_dtype(self))
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def _keep_stages(self, name: str, count: int, classifier: bool) -> None:
        """Leaves the first ``count`` stages of the list ``name``; without the ``classifier``, features of their width.

        What :meth:`prune_intermediate_layers` of all three has in common.
        """
        setattr(self, name, getattr(self, name)[:count])
        self.feature_info = self.feature_info[:count]
        if not classifier:
            self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
            self.reset_classifier(0, "")
