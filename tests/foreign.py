"""Small networks that timm has not, written from their papers: what makes each special is there, at 32 pixels.

Features are pooled and have no classifier behind them, as ``Backbone.from_module`` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# ------------------------------------------------------------------------------------------------------------- HorNet


class ChannelNorm(nn.Module):
    """A layer norm over axis 1, spelled out as in the official ConvNets: no operator of torch reads its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GatedConv(nn.Module):
    """gnConv, Rao et al. 2022, arXiv:2207.14284, eq. 3.4: p_{k+1} = f_k(q_k) * g_k(p_k) / scale.

    The widths are C / 2^(n-1), ..., C / 2, C; one large depthwise convolution makes all q_k at once.
    """

    def __init__(self, width: int, order: int = 3, scale: float = 1 / 3) -> None:
        super().__init__()
        self.widths, self.scale = [width // 2 ** (order - 1 - k) for k in range(order)], scale
        self.proj_in = nn.Conv2d(width, 2 * width, 1)
        self.dwconv = nn.Conv2d(sum(self.widths), sum(self.widths), 7, padding=3, groups=sum(self.widths))
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:], strict=False))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, rest = torch.split(self.proj_in(x), (self.widths[0], sum(self.widths)), dim=1)
        first, *others = torch.split(self.dwconv(rest) * self.scale, self.widths, dim=1)
        p = p * first
        for pointwise, q in zip(self.pws, others, strict=True):
            p = pointwise(p) * q
        return self.proj_out(p)


class GlobalFilter(nn.Module):
    """What the ``gf`` models have for the depthwise convolution: every frequency of every channel has a weight."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(0.1 * torch.ones(width, side, side // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(frequencies, s=x.shape[2:], norm="ortho")


class HorBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.gnconv, self.gamma1 = ChannelNorm(width), GatedConv(width), nn.Parameter(torch.ones(width))
        self.norm2, self.gamma2 = nn.LayerNorm(width), nn.Parameter(torch.ones(width))
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1[:, None, None] * self.gnconv(self.norm1(x))
        y = self.pwconv2(functional.gelu(self.pwconv1(self.norm2(x.permute(0, 2, 3, 1)))))
        return x + (self.gamma2 * y).permute(0, 3, 1, 2)


class HorNet(nn.Module):
    """Recursive gated convolutions of order 3; with ``global_filter`` a circular one in the last stage."""

    def __init__(self, *, global_filter: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), ChannelNorm(16))
        self.stages = nn.ModuleList([nn.Sequential(HorBlock(16)), nn.Sequential(HorBlock(32))])
        self.downsample = nn.Sequential(ChannelNorm(16), nn.Conv2d(16, 32, 2, stride=2))
        self.norm = nn.LayerNorm(32)
        if global_filter:
            self.stages[1][0].gnconv.dwconv = GlobalFilter(8 + 16 + 32, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.downsample(self.stages[0](self.stem(images)))
        return self.norm(self.stages[1](x).mean((2, 3)))


# -------------------------------------------------------------------------------------------------------- InternImage


class DeformableConv(nn.Module):
    """DCNv3, Wang et al. 2022, arXiv:2211.05778, eq. 2: y(p) = sum_g sum_k w_g m_gk(p) x_g(p + p_k + dp_gk(p)).

    The masks m are a softmax over the 9 points of a group; x is sampled between pixels by ``grid_sample``.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.dw_conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.dw_norm = nn.LayerNorm(width)
        self.offset, self.mask = nn.Linear(width, groups * 9 * 2), nn.Linear(width, groups * 9)
        self.input_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        context = self.dw_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        context = functional.gelu(self.dw_norm(context))
        masks = self.mask(context).unflatten(-1, (self.groups, 9)).softmax(-1)
        offsets = self.offset(context).unflatten(-1, (self.groups, 18))
        sampled = deformed(self.input_proj(x), by_group(offsets), by_group(masks), self.groups)
        y = sampled.reshape(-1, x.shape[3], height * width).transpose(1, 2)
        return self.output_proj(y.unflatten(1, (height, width)))


def by_group(x: Tensor) -> Tensor:
    """(n, H, W, groups, d) as (n * groups, H * W, d)."""
    return x.flatten(1, 2).transpose(1, 2).flatten(0, 1)


def deformed(value: Tensor, offsets: Tensor, masks: Tensor, groups: int) -> Tensor:
    """Sums of ``value`` (n, H, W, C) at nine moved points: (n * groups, C / groups, H * W).

    ``offsets`` (n * groups, H * W, 18) are x and y in pixels, of points that go down the columns.
    """
    height, width = value.shape[1:3]
    value = by_group(value.unflatten(-1, (groups, -1))).transpose(1, 2).unflatten(-1, (height, width))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack((columns, rows), -1).reshape(-1, 1, 2)
    taps = torch.stack(torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij"), -1).reshape(1, 9, 2)
    at = (pixels + taps).to(offsets.dtype) + offsets.unflatten(-1, (9, 2))
    grid = (2 * at + 1) / torch.tensor([width, height], dtype=at.dtype) - 1
    sampled = functional.grid_sample(value, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (sampled * masks[:, None]).sum(-1)


class InternBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.dcn, self.gamma1 = nn.LayerNorm(width), DeformableConv(width, groups), half(width)
        self.norm2, self.gamma2 = nn.LayerNorm(width), half(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.dcn(self.norm1(x))
        return x + self.gamma2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))


def half(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.5))


class InternImage(nn.Module):
    """Deformable convolutions v3; maps are channels last between the convolutions of stem and head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem1, self.stem2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.stem_norm = nn.LayerNorm(16)
        self.levels = nn.ModuleList([nn.Sequential(InternBlock(16, 2)), nn.Sequential(InternBlock(32, 4))])
        self.downsample = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.LayerNorm(32)
        self.conv_head, self.bn_head = nn.Conv2d(32, 40, 1, bias=False), nn.BatchNorm2d(40)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem2(functional.gelu(self.stem1(images))).permute(0, 2, 3, 1)
        x = self.levels[0](self.stem_norm(x)).permute(0, 3, 1, 2)
        x = self.levels[1](self.down_norm(self.downsample(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return functional.gelu(self.bn_head(self.conv_head(x))).mean((2, 3))


# ------------------------------------------------------------------------------------------------------------- RevCol

WIDTHS = (8, 16, 24, 32)


class Fusion(nn.Module):
    """The level below of this column, made smaller, with the level above of the column before, made larger."""

    def __init__(self, level: int, first_column: bool) -> None:
        super().__init__()
        width = WIDTHS[level]
        self.down = nn.Identity()
        if level > 0:
            self.down = nn.Sequential(nn.Conv2d(WIDTHS[level - 1], width, 2, stride=2), ChannelNorm(width))
        self.up = None
        if level + 1 < len(WIDTHS) and not first_column:
            self.up = nn.Sequential(
                nn.Conv2d(WIDTHS[level + 1], width, 1), ChannelNorm(width), nn.Upsample(scale_factor=2)
            )

    def forward(self, below: Tensor, above: Tensor | int) -> Tensor:
        return self.down(below) if self.up is None else self.down(below) + self.up(above)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = half(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * self.pwconv2(functional.gelu(y))).permute(0, 3, 1, 2)


class Column(nn.Module):
    """One stream for each level: the column before, scaled by alpha for each channel, plus this column's level."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.fusions = nn.ModuleList(Fusion(level, first) for level in range(len(WIDTHS)))
        self.blocks = nn.ModuleList(ConvNeXtBlock(width) for width in WIDTHS)
        for level, width in enumerate(WIDTHS):
            self.register_parameter(f"alpha{level}", half(1, width, 1, 1))

    def forward(self, stem: Tensor, before: Sequence[Tensor | int]) -> list[Tensor]:
        streams, below = [], stem
        for level, (fusion, block) in enumerate(zip(self.fusions, self.blocks, strict=True)):
            above = before[level + 1] if level + 1 < len(WIDTHS) else 0
            below = getattr(self, f"alpha{level}") * before[level] + block(fusion(below, above))
            streams.append(below)
        return streams


class RevCol(nn.Module):
    """Two columns of four levels, Cai et al. 2022, arXiv:2212.11696, eq. 3, run forward only.

    As in the official code the first column reads zeros for the one before it: its alphas multiply nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 4, stride=4), ChannelNorm(WIDTHS[0]))
        self.subnet0, self.subnet1 = Column(first=True), Column(first=False)
        self.norm = nn.LayerNorm(WIDTHS[-1])

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        streams: Sequence[Tensor | int] = (0, 0, 0, 0)
        for column in (self.subnet0, self.subnet1):
            streams = column(stem, streams)
        return self.norm(streams[-1].mean((2, 3)))


# ------------------------------------------------------------------------------------------------------------ HAT-Net


class HierarchicalAttention(nn.Module):
    """H-MSA, Liu et al. 2021, arXiv:2106.03180, eq. 5 to 9: within g x g grids, then of all tokens over pooled ones.

    Tensors have five axes at most; the official code's have eight. ``proj_norm`` is made and never used there, too.
    """

    def __init__(self, width: int, head: int, grid: int, pooling: int) -> None:
        super().__init__()
        self.head, self.grid = head, grid
        self.norm = nn.GroupNorm(1, width)
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.proj_norm = nn.GroupNorm(1, width)
        if grid > 1:
            self.grid_norm, self.ds_norm = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
            self.avg_pool = nn.AvgPool2d(pooling)
            self.q, self.kv = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        qkv = self.qkv(self.norm(x))
        if self.grid > 1:
            grids = in_grids(qkv, self.grid, self.head)
            y = self.attend(grids[:, 0], grids[:, 1], grids[:, 2])
            local = self.grid_norm(x + out_of_grids(y, self.grid, (height, width)))
            pooled = self.ds_norm(self.avg_pool(local))
            qkv = self.q(local).flatten(2), *self.kv(pooled).flatten(2).chunk(2, dim=1)
        else:
            qkv = qkv.flatten(2).chunk(3, dim=1)
        q, k, v = (part.unflatten(1, (-1, self.head)).transpose(2, 3) for part in qkv)
        y = self.attend(q, k, v).transpose(2, 3)  # (n, heads, head, tokens)
        return self.proj(y.flatten(1, 2).unflatten(-1, (height, width)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.head**-0.5
        return scores.softmax(-1) @ v


def in_grids(qkv: Tensor, grid: int, head: int) -> Tensor:
    """Maps (n, 3 C, H, W) as (n, 3, heads * grids, grid * grid, head), by way of two reshapes of four axes."""
    n, channels, height, width = qkv.shape
    rows, columns, heads = height // grid, width // grid, channels // (3 * head)
    x = qkv.reshape(-1, grid, columns, grid).transpose(1, 2)
    x = x.reshape(n * 3 * heads, head, rows * columns, grid * grid).permute(0, 2, 3, 1)
    return x.reshape(n, 3, heads * rows * columns, grid * grid, head)


def out_of_grids(y: Tensor, grid: int, size: tuple[int, int]) -> Tensor:
    """(n, heads * grids, grid * grid, head) as maps (n, C, H, W)."""
    n, _, _, head = y.shape
    rows, columns = size[0] // grid, size[1] // grid
    y = y.reshape(-1, rows * columns, grid * grid, head).permute(0, 3, 1, 2)
    return y.reshape(-1, columns, grid, grid).transpose(1, 2).reshape(n, -1, *size)


class HatBlock(nn.Module):
    def __init__(self, width: int, grid: int, pooling: int) -> None:
        super().__init__()
        wide = 4 * width
        self.attn = HierarchicalAttention(width, 8, grid, pooling)
        self.conv = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, wide, 1, bias=False),
            nn.SiLU(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.SiLU(inplace=True),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.GroupNorm(1, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.conv(x)


class HatNet(nn.Module):
    """Hierarchical attention in grids of 4 x 4 on maps of 8 x 8, then of all tokens of 4 x 4 maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, 8), nn.SiLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
        )  # fmt: skip
        self.blocks = nn.ModuleList([HatBlock(16, 4, 2), HatBlock(24, 1, 1)])
        self.downsample = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.GroupNorm(1, 24))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks[1](self.downsample(self.blocks[0](self.stem(images)))).mean((2, 3))
