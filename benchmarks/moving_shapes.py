"""The videos of `vamba.demo.videos`, of any length and many at once, made where the model computes.

    frames_BTHWC, answers_B3 = make_videos(32, 48, torch.Generator("cuda").manual_seed(0))

What is unusual: nothing loops over videos or frames, and nothing is compressed, as small models would wait for it. Each
answer is drawn by itself, from all there are, so that neither a question nor another answer tells anything of it.

Shapes: B videos, T frames, H and W pixels, C colours.
"""

import torch
from torch import Tensor

from vamba.demo.videos import COLOURS, FLASH_FRAMES, MOMENTS, SHAPES, SIZE, VISIT_FRAMES


PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
QUESTIONS = ("first", "shape", "moment")  # which colour flashed first, which shape came in, and when it did
NUM_ANSWERS = (len(COLOURS), len(SHAPES), len(MOMENTS))


def make_videos(count: int, num_frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames, (B, T, SIZE, SIZE, 3) float32 from 0 to 255, and the indices of the answers to `QUESTIONS`, (B, 3)."""
    device, B, T = generator.device, count, num_frames

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator, device=device)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    palette, times = PALETTE.to(device), torch.arange(T, device=device)
    flashes_B2, balls_B2 = _different(B, below), _different(B, below)
    shape_B, moment_B = below(len(SHAPES), B), below(len(MOMENTS), B)
    starts_B3, stops_B3 = _spans(moment_B, T, below, between)
    flash_B2 = _others(moment_B)
    frames = between(10, 60, B, 1, 1).expand(B, T, 3)
    for order in (0, 1):
        rows = torch.arange(B, device=device), flash_B2[:, order]
        lit_BT = (times >= starts_B3[rows][:, None]) & (times < stops_B3[rows][:, None])
        frames = torch.where(lit_BT[..., None], palette[flashes_B2[:, order], None], frames)
    frames = frames[:, :, None, None].repeat(1, 1, SIZE, SIZE, 1)
    for ball in (0, 1):
        way = (between(0, 2 * SIZE, B, 1, 2) + between(-3, 3, B, 1, 2) * times[:, None]) % (2 * SIZE)
        dy, dx = _distances(torch.minimum(way, 2 * SIZE - way))
        frames = torch.where((dy**2 + dx**2 <= 25)[..., None], palette[balls_B2[:, ball], None, None, None], frames)
    rows = torch.arange(B, device=device)
    visited = rows[:, None], starts_B3[rows, moment_B, None] + torch.arange(VISIT_FRAMES, device=device)
    mask = shape_masks(*_distances(_visit(B, below, between)), radius=15)[shape_B, rows]
    frames[visited] = torch.where(mask[..., None], 245.0, frames[visited])
    return frames, torch.stack([flashes_B2[:, 0], shape_B, moment_B], 1)


def _different(B: int, below) -> Tensor:
    """Two different colours of each video, (B, 2)."""
    first = below(len(COLOURS), B)
    return torch.stack([first, (first + 1 + below(len(COLOURS) - 1, B)) % len(COLOURS)], 1)


def _others(moment_B: Tensor) -> Tensor:
    """Which of the three events are the two flashes, in order, (B, 2)."""
    return torch.tensor([[1, 2], [0, 2], [0, 1]], device=moment_B.device)[moment_B]


def _spans(moment_B: Tensor, T: int, below, between) -> tuple[Tensor, Tensor]:
    """First frame of each of the three events, and the frame after its last, (B, 3); a quiet frame is around each."""
    lengths_B3 = FLASH_FRAMES[0] + below(FLASH_FRAMES[1] - FLASH_FRAMES[0] + 1, len(moment_B), 3)
    lengths_B3[torch.arange(len(moment_B)), moment_B] = VISIT_FRAMES
    slack_B1 = T - lengths_B3.sum(1, keepdim=True) - 4
    cuts_B3 = (between(0, 1, len(moment_B), 3) * (slack_B1 + 1)).long().sort(1).values
    starts_B3 = 1 + torch.arange(3, device=moment_B.device) + lengths_B3.cumsum(1) - lengths_B3 + cuts_B3
    return starts_B3, starts_B3 + lengths_B3


def _visit(B: int, below, between) -> Tensor:
    """The way of the shape, (B, VISIT_FRAMES, 2): from beyond one side to near the middle, and back."""
    middle = SIZE / 2 + between(-4, 4, B, 1, 2)
    side = below(2, B, 1, 1) == torch.arange(2, device=middle.device)
    outside = torch.where(side, -8.0 + (SIZE + 16) * below(2, B, 1, 1), middle)
    nearness = torch.tensor([0.35, 0.9, 1.0, 1.0, 0.9, 0.35], device=middle.device)[:, None]
    return outside + nearness * (middle - outside)


def _distances(centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pixel from the centres (..., 2), downwards and to the right, each (..., SIZE, SIZE)."""
    pixels = torch.arange(SIZE, device=centres.device)
    y, x = centres[..., None, None].unbind(-3)
    return (pixels[:, None] - y).expand(*y.shape[:-2], SIZE, SIZE), (pixels - x).expand(*x.shape[:-2], SIZE, SIZE)


def shape_masks(dy: Tensor, dx: Tensor, radius: float) -> Tensor:
    """The pixels of each of `SHAPES`, bool (len(SHAPES), *dy.shape), by their distances from its centre."""
    circle = dy**2 + dx**2 <= radius**2
    masks = {
        "circle": circle,
        "square": torch.maximum(dy.abs(), dx.abs()) <= 0.85 * radius,
        "triangle": (dx.abs() <= (dy + radius) / 2) & (dy <= 0.8 * radius),
        "ring": circle & (dy**2 + dx**2 >= (0.55 * radius) ** 2),
        "bar": (dy.abs() <= 0.3 * radius) & (dx.abs() <= radius),
        "cross": (torch.minimum(dy.abs(), dx.abs()) <= 0.3 * radius) & (torch.maximum(dy.abs(), dx.abs()) <= radius),
    }
    return torch.stack([masks[name] for name in SHAPES])


def patches_of(frames: Tensor, patch_size: int, temporal_patch_size: int) -> tuple[Tensor, Tensor]:
    """What the models' processors make of frames: normalised patches, in the order in which 2 x 2 neighbours follow,
    (patches, 3 * temporal_patch_size * patch_size**2), and `grid_thw`, (B, 3), on the CPU."""
    B, T = frames.shape[:2]
    p, t, half = patch_size, temporal_patch_size, SIZE // patch_size // 2
    x = ((frames / 255 - 0.45) / 0.27).reshape(B, T // t, t, half, 2, p, half, 2, p, 3)
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)  # (B, T / t, half, half, 2, 2, 3, t, p, p)
    return x.reshape(-1, 3 * t * p * p), torch.tensor([[T // t, 2 * half, 2 * half]] * B)
