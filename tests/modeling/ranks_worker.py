"""What each process of test_ranks.py runs: mixtures of batches on sharded weights, against the same batches alone.

Arguments: "ddp", "fsdp2" or "zero3", and the cases as JSON, [[model, packed, cells, kinds of the ranks' batches], ...];
or "generate", and [[model, kinds of the ranks' prompts], ...].
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import vamba.demo  # noqa: F401  before tests/vamba, a folder of the same name, is on the path


sys.path.append(str(Path(__file__).resolve().parents[1]))
import tiny_vamba  # noqa: E402
import tiny_video_ma2mba  # noqa: E402


# On a machine with a GPU for each process on those, else on the CPU.
GPU = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["RANK"])) if GPU else torch.device("cpu")
SHARDED = ("VambaDecoderLayer", "VambaVideoLevel", "VambaVisionBlock", "VideoMa2mbaBlock", "CLIPEncoderLayer")
SAMPLES = {"text": ["text"], "image": ["image"], "short": ["short", "text", "short"], "long": ["long"]}
FRAMES = {"image": 1, "short": 3, "long": 200}


def rows_of(kinds: list[str], name: str):
    """Input ids of each sample, and the pixels and grids of all."""
    ids, images, videos, types = [], [], [], []
    for seed, kind in enumerate(kinds):
        has_media = kind != "text"
        room = tiny_vamba if name == "vamba" else tiny_video_ma2mba
        ids.append(room.prompt(4 + seed, int(has_media), seed=seed)[0])
        types.append(torch.zeros_like(ids[-1]))
        types[-1][0] = {"text": 0, "image": 1}.get(kind, 2)
        if has_media:
            (images if kind == "image" else videos).append(FRAMES[kind])
    batch = {}
    if name == "vamba":
        for frames, keys in (
            (images, ("pixel_values", "image_grid_thw")),
            (videos, ("pixel_values_videos", "video_grid_thw")),
        ):
            if frames:
                batch |= zip(keys, tiny_vamba.media(*((max(1, t // 2), 4, 2) for t in frames), seed=len(kinds)))
    else:
        batch = (tiny_video_ma2mba.image(len(images)) if images else {}) | (
            tiny_video_ma2mba.video(*videos) if videos else {}
        )
    return ids, types, batch


def batch_of(kind: str, name: str, packed: bool) -> dict:
    ids, types, batch = rows_of(SAMPLES[kind.removeprefix("broken ")], name)
    if kind.startswith("broken "):
        batch["video_grid_thw"] = batch["video_grid_thw"] + 2
    if packed:
        labels = torch.cat([torch.cat([torch.tensor([-100]), row[1:]]) for row in ids])[None]
        joined = {"input_ids": torch.cat(ids)[None], "mm_token_type_ids": torch.cat(types)[None], "labels": labels}
        return joined | {"packed_lengths": [len(row) for row in ids]} | batch
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(row) for row in ids])
    padded = {"input_ids": pad(ids), "mm_token_type_ids": pad(types), "attention_mask": mask}
    return padded | {"labels": pad(ids, padding_value=-100)} | batch


def make(name: str, cells: bool):
    model = (tiny_vamba if name == "vamba" else tiny_video_ma2mba).tiny_model().train().to(DEVICE)
    if cells:
        model.gradient_checkpointing_enable()
        model.enable_multi_axis_checkpointing(2, 7)
    return model


def loss_of(model, batch):
    batch = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    return model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=10).loss


def alone(name: str, packed: bool, kind: str):
    """Loss and gradients of one process's batch, on weights of its own. Before there is a process group."""
    model = make(name, cells=False)
    loss = loss_of(model, batch_of(kind, name, packed))
    loss.backward()
    return loss.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def fsdp2(name: str, cells: bool, batch: dict):
    model = sharded(make(name, cells))
    loss = loss_of(model, batch)
    loss.backward()
    grads = {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        evaluated = loss_of(model, batch)
    return loss.detach(), grads, evaluated


def answer(model, name: str, kind: str) -> torch.Tensor:
    """Greedy tokens after one sample."""
    ids, types, media = rows_of(SAMPLES[kind][:1], name)
    inputs = {"input_ids": ids[0][None], "mm_token_type_ids": types[0][None], **media}
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    mask = torch.ones_like(inputs["input_ids"])
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return model.generate(**inputs, attention_mask=mask, synced_gpus=dist.is_initialized(), **length)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in SHARDED:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(name: str, cells: bool, batch: dict):
    model = make(name, cells)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)  # which waits for a gradient of every parameter
    loss = loss_of(wrapped, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, loss.detach()


def zero3(name: str, cells: bool, batch: dict):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = make(name, cells)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), 1e-3), dist_init_required=False
    )
    loss = loss_of(engine, batch)
    engine.backward(loss)
    grads = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
    engine.eval()
    with torch.no_grad():
        evaluated = loss_of(engine, batch)
    engine.destroy()
    return loss.detach(), grads, evaluated


def train(kind: str, cases: list, rank: int) -> dict[str, float]:
    """The largest difference to the losses and gradients of the batches alone, by case."""
    needed = {(name, packed, mixture[rank]) for name, packed, _, mixture in cases}
    references = {key: alone(*key) for key in sorted(needed) if not key[2].startswith("broken ")}
    meet()
    worst = {}
    for name, packed, cells, mixture in cases:
        loss, expected = references.get((name, packed, mixture[rank]), (None, None))
        found, grads, evaluated = {"ddp": ddp, "fsdp2": fsdp2, "zero3": zero3}[kind](
            name, cells, batch_of(mixture[rank], name, packed)
        )
        differences = [float((found - loss).abs()), float((evaluated - loss).abs())]
        for parameter, gradient in expected.items():
            mean = gradient.clone()
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
            got = torch.zeros_like(mean) if grads[parameter] is None else grads[parameter]
            differences.append(float((got - mean).abs().max()))
        worst[f"{name} {'packed ' * packed}{'cells ' * cells}{'/'.join(mixture)}"] = max(differences)
    return worst


def generate(cases: list, rank: int) -> dict[str, float]:
    """By case, how many ranks answer something else than alone."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    needed = {(name, mixture[rank]) for name, mixture in cases}
    expected = {(name, kind): answer(make(name, cells=False).eval(), name, kind) for name, kind in sorted(needed)}
    meet()
    wrong = {}
    for name, mixture in cases:
        model = sharded(make(name, cells=False).eval())
        register_fsdp_forward_method(model, "generate")
        found = answer(model, name, mixture[rank])
        differs = torch.tensor(float(not torch.equal(found, expected[name, mixture[rank]])), device=DEVICE)
        dist.all_reduce(differs)
        wrong[f"{name} {'/'.join(mixture)}"] = differs.item()
    return wrong


def meet() -> None:
    if GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if GPU else "gloo")


def main() -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # of the vision tower's convolutions
    kind, cases, rank = sys.argv[1], json.loads(sys.argv[2]), int(os.environ["RANK"])
    result = generate(cases, rank) if kind == "generate" else train(kind, cases, rank)
    if rank == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter's end, which then aborts


if __name__ == "__main__":
    main()
