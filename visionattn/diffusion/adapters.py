"""One small adapter a model: which attentions have the grid, where the text sits, how a call tells the grid."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import dispatch
from .layout import GridError, Layout, grid_of_ids

Cache = Callable[[torch.Tensor, Callable], Any]


class Site:
    """An attention module of a transformer, and how its processor is led to our function.

    ``dispatched`` processors ask diffusers' dispatcher, by their ``_attention_backend``; others are replaced.
    """

    def __init__(self, name: str, module: nn.Module, processor: Callable | None = None):
        self.name = name
        self.module = module
        self.make_processor = processor

    @property
    def processor(self) -> Any:
        return self.module.processor

    def install(self, layer: Any) -> None:
        if self.make_processor is not None:
            if hasattr(self.processor, "visionattn_original"):
                raise ValueError(f"{self.name} is patched already: remove the other handle first")
            if not self._wrap(layer):
                raise ValueError(
                    f"{self.name} has a {type(self.processor).__name__}, which does more than the attention that a "
                    "pattern stands in for: leave it out with layers=..., or set diffusers' own processor first"
                )
            return
        if not hasattr(self.processor, "_attention_backend"):
            raise ValueError(
                f"{self.name} has a {type(self.processor).__name__}, which diffusers' dispatcher does not serve: "
                "leave it out with layers=..., or set diffusers' own processor first"
            )
        if dispatch.is_ours(self.processor._attention_backend):
            raise ValueError(f"{self.name} is patched already: remove the other handle first")
        layer.member = layer.own_member = dispatch.add_backend(layer.__call__)
        layer.taken = []
        self._take(layer)

    def _take(self, layer: Any) -> None:
        processor = self.processor
        layer.previous = processor._attention_backend
        layer.taken.append((processor, "_attention_backend" in vars(processor), layer.previous))
        processor._attention_backend = layer.member

    def _wrap(self, layer: Any) -> bool:
        """Puts our processor in place of one that computes what ours can; False for another."""
        new = self.make_processor(layer)
        if type(self.processor).__name__ not in new.stands_for:
            return False
        new.visionattn_original = self.processor
        self.module.set_processor(new)
        return True

    def keep(self, layer: Any) -> None:
        """Stays installed when someone sets another backend or processor; that one becomes the dense one.

        A processor that ours can't stand in for (guidance by perturbed attention sets such ones) stays, unpatched.
        """
        if self.make_processor is not None:
            if not hasattr(self.processor, "visionattn_original") and not self._wrap(layer):
                layer.reason = f"a {type(self.processor).__name__} was set"
            return
        if not hasattr(self.processor, "_attention_backend"):
            layer.reason = f"a {type(self.processor).__name__} was set"
        elif self.processor._attention_backend is not layer.member:
            self._take(layer)

    def share(self, layer: Any, member: Any) -> None:
        """Lets the layer's processors ask for ``member``, another layer's function, or its own again."""
        if member is layer.member:
            return
        for processor, _, _ in layer.taken:
            if processor._attention_backend is layer.member:
                processor._attention_backend = member
        layer.member = member

    def restore(self, layer: Any) -> None:
        if self.make_processor is not None:
            if getattr(self.processor, "visionattn_original", None) is not None:
                self.module.set_processor(self.processor.visionattn_original)
            return
        for processor, own, previous in reversed(layer.taken):  # processors that were replaced meanwhile, too
            if processor._attention_backend is not layer.member:
                continue
            if own:
                processor._attention_backend = previous
            else:
                del processor._attention_backend
        dispatch.remove_backend(layer.own_member)
        layer.member = layer.own_member = None


class Adapter:
    """Base of all adapters; a subclass names its ``models`` and answers :meth:`sites` and :meth:`layout`."""

    models: tuple[str, ...] = ()
    ndim = 2

    def sites(self, transformer: nn.Module) -> list[Site]:
        """The attentions whose sequence holds the grid, in the order that they run."""
        raise NotImplementedError

    def layout(self, transformer: nn.Module, call: dict, cache: Cache) -> tuple[Layout, torch.Tensor | None]:
        """This call's layout, and the valid text tokens (B,) where text is padded.

        Raises:
            GridError: for tokens that are no grid; the call stays dense.
        """
        raise NotImplementedError

    def bind(self, transformer: nn.Module, args: tuple, kwargs: dict) -> dict:
        """The call's arguments by name."""
        if not args:
            return kwargs
        names = _parameters(type(transformer))
        return {**dict(zip(names, args, strict=False)), **kwargs}


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]


def _need(call: dict, name: str) -> Any:
    value = call.get(name)
    if value is None:
        raise GridError(f"the call has no {name}")
    return value


def _lengths(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Valid tokens of a (B, T) text mask whose padding is at the end."""
    return None if mask is None else mask.to(torch.bool).sum(dim=1, dtype=torch.int32)


class Flux(Adapter):
    """FLUX.1, Kontext, Fill, ControlNets: [text | image | references], ids (1 for a reference, row, column)."""

    models = ("FluxTransformer2DModel", "FluxControlNetModel")

    def sites(self, transformer):
        blocks = [("transformer_blocks", b) for b in transformer.transformer_blocks]
        blocks += [("single_transformer_blocks", b) for b in transformer.single_transformer_blocks]
        sites, counts = [], {}
        for name, block in blocks:
            counts[name] = counts.get(name, -1) + 1
            sites.append(Site(f"{name}.{counts[name]}.attn", block.attn))
        return sites

    def layout(self, transformer, call, cache):
        ids = _need(call, "img_ids")
        grid, extra = cache(ids, self.grid)
        text = _need(call, "encoder_hidden_states").shape[1]
        text += bool(getattr(transformer, "union", False))  # a union ControlNet's mode is a token before the text
        return Layout(grid, text, True, extra), None

    @staticmethod
    def grid(ids: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """Grid of the image's ids and number of reference tokens behind it."""
        ids = ids[0] if ids.ndim == 3 else ids
        own = (ids[:, 0] == ids[0, 0]).to("cpu")
        tokens = int(own.sum())
        if not bool(own[:tokens].all()):
            raise GridError("the image's position ids are not together")
        return grid_of_ids(ids[:tokens], rows=1, cols=2), len(ids) - tokens


class Chroma(Flux):
    """Chroma: as FLUX.1, with a mask (B, text + image) of what is padding behind the text.

    diffusers' pipeline makes a float mask of it, which PyTorch adds to the logits: that is no padding, and stays dense.
    """

    models = ("ChromaTransformer2DModel",)

    def layout(self, transformer, call, cache):
        layout, _ = super().layout(transformer, call, cache)
        mask = call.get("attention_mask")
        if mask is None:
            return layout, None
        if mask.dtype != torch.bool:
            raise GridError(f"its attention_mask is {mask.dtype}, added to the logits: padding needs a bool mask")
        return replace(layout, padded_text=True), _lengths(mask[:, : layout.text])


class Flux2(Flux):
    """FLUX.2: as FLUX.1, ids (time, row, column, layer); references have another time."""

    models = ("Flux2Transformer2DModel",)

    def layout(self, transformer, call, cache):
        if call.get("kv_cache") is not None or call.get("kv_cache_mode") is not None:
            raise GridError("the reference tokens' keys are cached")
        return super().layout(transformer, call, cache)


class Flux3(Adapter):
    """FLUX.3: first the image alone, then [text | image | references]; ids (time, row, column, layer)."""

    models = ("Flux3Transformer2DModel",)

    def sites(self, transformer):
        early, joint = transformer.mode_blocks["image"], transformer.single_transformer_blocks
        sites = [Site(f"mode_blocks.image.{i}.attn", b.attn) for i, b in enumerate(early)]
        return sites + [Site(f"single_transformer_blocks.{i}.attn", b.attn) for i, b in enumerate(joint)]

    def layout(self, transformer, call, cache):
        grid = cache(_need(call, "img_ids"), self.grid)
        references = call.get("image_cond_hidden_states")
        extra = 0 if references is None else references.shape[1]
        return Layout(grid, _need(call, "encoder_hidden_states").shape[1], True, extra), None

    @staticmethod
    def grid(ids: torch.Tensor) -> tuple[int, ...]:
        return grid_of_ids(ids, rows=1, cols=2)


class QwenImage(Adapter):
    """Qwen-Image: [text | image | references], shapes (frames, rows, columns) in ``img_shapes``."""

    models = ("QwenImageTransformer2DModel",)

    def sites(self, transformer):
        return [Site(f"transformer_blocks.{i}.attn", b.attn) for i, b in enumerate(transformer.transformer_blocks)]

    def layout(self, transformer, call, cache):
        shapes = _need(call, "img_shapes")
        images = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
        if any(s != shapes[0] for s in shapes[1:] if isinstance(shapes[0], list)):
            raise GridError("the images of a batch have different shapes")
        (frames, height, width), *others = images
        grid = (height, width) if frames == 1 else (frames, height, width)
        extra = sum(t * h * w for t, h, w in others)
        text = _need(call, "encoder_hidden_states").shape[1]
        lengths = _lengths(call.get("encoder_hidden_states_mask"))
        return Layout(grid, text, True, extra, lengths is not None), lengths


def _patches(latent: torch.Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    lengths = latent.shape[-len(sizes) :]
    if any(n % p for n, p in zip(lengths, sizes, strict=True)):
        raise GridError(f"latents of {tuple(lengths)} are not whole patches of {sizes}")
    return tuple(n // p for n, p in zip(lengths, sizes, strict=True))


class HunyuanVideo(Adapter):
    """HunyuanVideo: [video | text], padded text masked; latents (B, C, frames, height, width)."""

    models = ("HunyuanVideoTransformer3DModel",)
    ndim = 3

    def sites(self, transformer):
        sites = [Site(f"transformer_blocks.{i}.attn", b.attn) for i, b in enumerate(transformer.transformer_blocks)]
        single = transformer.single_transformer_blocks
        return sites + [Site(f"single_transformer_blocks.{i}.attn", b.attn) for i, b in enumerate(single)]

    def layout(self, transformer, call, cache):
        config = transformer.config
        sizes = (config.patch_size_t, config.patch_size, config.patch_size)
        grid = _patches(_need(call, "hidden_states"), sizes)
        text = _need(call, "encoder_hidden_states").shape[1]
        lengths = _lengths(call.get("encoder_attention_mask"))
        return Layout(grid, text, False, padded_text=lengths is not None), lengths


class Wan(Adapter):
    """Wan 2.x: self-attention over the video alone; latents (B, C, frames, height, width)."""

    models = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    ndim = 3

    def sites(self, transformer):
        names = [name for name in ("vace_blocks", "blocks") if hasattr(transformer, name)]
        blocks = [(name, i, block) for name in names for i, block in enumerate(getattr(transformer, name))]
        return [Site(f"{name}.{i}.attn1", block.attn1) for name, i, block in blocks]

    def layout(self, transformer, call, cache):
        return Layout(_patches(_need(call, "hidden_states"), tuple(transformer.config.patch_size))), None


class WanAnimate(Wan):
    """Wan 2.2 Animate: as Wan; the first frame is the reference picture, which all see."""

    models = ("WanAnimateTransformer3DModel",)

    def layout(self, transformer, call, cache):
        frames, height, width = super().layout(transformer, call, cache)[0].grid
        if frames < 2:
            raise GridError("there is no frame but the reference")
        return Layout((frames - 1, height, width), height * width), None


class LTX(Adapter):
    """LTX-Video: self-attention over [conditions | video]; the grid is in the call's arguments, or coordinates."""

    models = ("LTXVideoTransformer3DModel",)
    ndim = 3

    def sites(self, transformer):
        return [Site(f"transformer_blocks.{i}.attn1", b.attn1) for i, b in enumerate(transformer.transformer_blocks)]

    def layout(self, transformer, call, cache):
        coordinates = call.get("video_coords")
        if coordinates is not None:
            return Layout(*cache(coordinates, self.grid)), None
        grid = tuple(int(_need(call, name)) for name in ("num_frames", "height", "width"))
        return Layout(grid), None

    @staticmethod
    def grid(coordinates: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """Grid of a video's coordinates (B, 3, N), and the tokens of conditions, at later frames, that lie before it.

        Steps differ from axis to axis and along the frames: coordinates are numbered first.
        """
        places = coordinates[0].detach().to("cpu").T
        starts = (places == places.amin(0)).all(dim=1).nonzero()
        conditions = int(starts[-1]) if len(starts) else 0
        own = [axis.unique(return_inverse=True)[1] for axis in places[conditions:].T]
        return grid_of_ids(torch.stack(own, dim=1), frames=0, rows=1, cols=2), conditions


def _processor(name: str) -> Callable:
    def make(layer: Any) -> Any:
        from . import processors

        return getattr(processors, name)(layer)

    return make


class DiT(Adapter):
    """DiT and PixArt: self-attention over the image alone; latents (B, C, height, width)."""

    models = ("DiTTransformer2DModel", "PixArtTransformer2DModel")

    def sites(self, transformer):
        make = _processor("SelfAttention")
        blocks = enumerate(transformer.transformer_blocks)
        return [Site(f"transformer_blocks.{i}.attn1", b.attn1, make) for i, b in blocks]

    def layout(self, transformer, call, cache):
        size = transformer.config.patch_size
        return Layout(_patches(_need(call, "hidden_states"), (size, size))), None


class SD3(Adapter):
    """Stable Diffusion 3 and 3.5: [image | text], some blocks with a second attention of the image alone."""

    models = ("SD3Transformer2DModel",)

    def sites(self, transformer):
        sites = []
        for i, block in enumerate(transformer.transformer_blocks):
            sites.append(Site(f"transformer_blocks.{i}.attn", block.attn, _processor("JointImageFirst")))
            if getattr(block, "attn2", None) is not None:
                sites.append(Site(f"transformer_blocks.{i}.attn2", block.attn2, _processor("JointImageFirst")))
        return sites

    def layout(self, transformer, call, cache):
        size = transformer.config.patch_size
        grid = _patches(_need(call, "hidden_states"), (size, size))
        return Layout(grid, _need(call, "encoder_hidden_states").shape[1], False), None


class CogVideoX(Adapter):
    """CogVideoX: [text | video]; latents (B, frames, C, height, width)."""

    models = ("CogVideoXTransformer3DModel",)
    ndim = 3

    def sites(self, transformer):
        make = _processor("JointTextFirstRotary")
        blocks = enumerate(transformer.transformer_blocks)
        return [Site(f"transformer_blocks.{i}.attn1", b.attn1, make) for i, b in blocks]

    def layout(self, transformer, call, cache):
        latent = _need(call, "hidden_states")
        size, size_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
        height, width = _patches(latent, (size, size))
        frames = latent.shape[1]
        if frames % size_t:
            raise GridError(f"{frames} latent frames are not whole patches of {size_t}")
        return Layout((frames // size_t, height, width), _need(call, "encoder_hidden_states").shape[1], True), None


_adapters: dict[str, Adapter] = {}


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: makes an adapter known for the model classes that it names; a later one wins.

    Raises:
        ValueError: for an adapter that names no model.
    """
    if not adapter.models:
        raise ValueError(f"{adapter.__name__} names no model: set models = ('ClassName', ...)")
    for model in adapter.models:
        _adapters[model] = adapter()
    return adapter


for _adapter in (Flux, Chroma, Flux2, Flux3, QwenImage, HunyuanVideo, Wan, WanAnimate, LTX, DiT, SD3, CogVideoX):
    register_adapter(_adapter)


def _find(transformer: nn.Module) -> Adapter | None:
    module = getattr(transformer, "_orig_mod", transformer)
    return next((_adapters[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _adapters), None)


def has_adapter(transformer: nn.Module) -> bool:
    """Whether :func:`adapter_of` finds one."""
    return _find(transformer) is not None


def adapter_of(transformer: nn.Module) -> Adapter:
    """The adapter of a transformer, by the name of its class or of a base.

    Raises:
        ValueError: with the list of those that have one.
    """
    found = _find(transformer)
    if found is None:
        name = type(getattr(transformer, "_orig_mod", transformer)).__name__
        raise ValueError(
            f"{name} has no adapter; {', '.join(sorted(_adapters))} have one: write another with "
            "visionattn.diffusion.register_adapter"
        )
    return found
