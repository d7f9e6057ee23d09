"""One PLIP step in several gloo processes; `test_pretraining_ranks.py` starts them.

Usage: pretraining_ranks.py GOLDEN OUTPUT GATHER_NEGATIVES(0|1)

Every rank takes one sample of the golden step. Rank 0 writes losses and gradient norms averaged
over the ranks; every rank writes its queues.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, CLIPVisionConfig

from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.plip_text import PLIPTextEncoder
from pallava.plip.pretraining import PLIPPretrainingModel

QUEUES = ("image_queue", "text_queue", "idx_queue", "ptr_queue")


class Losses(torch.nn.Module):
    """DDP wants tensors from `forward`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        output = self.model(*inputs)
        return output.loss_ita, output.loss_itm


def main():
    golden, output = Path(sys.argv[1]), Path(sys.argv[2])
    gather_negatives = sys.argv[3] == "1"
    expected = json.loads((golden / "expected.json").read_text())
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    text_config = BertConfig(**{**expected["bert"], "vocab_size": 42})
    model = PLIPPretrainingModel(
        PLIPVisionEncoder(CLIPVisionConfig(**expected["vision"])),
        PLIPTextEncoder(text_config, expected["vision"]["hidden_size"]),
        enc_token_id=expected["enc_token_id"],
        embed_dim=expected["embed_dim"],
        queue_size=expected["queue_size"],
        positives="same_sample",
        empty_slots="negatives",
        gather_negatives=gather_negatives,
    ).train()
    wrapped = DistributedDataParallel(Losses(model), broadcast_buffers=False)
    model.load_state_dict(load_file(golden / "weights_before.safetensors"))
    if rank > 0:  # must not matter: rank 0's queues count
        torch.nn.init.normal_(model.image_queue)
        torch.nn.init.normal_(model.text_queue)
    io = load_file(golden / "io.safetensors")
    own = slice(rank, rank + 1)
    length = int(io["attention_mask"][own].sum())  # every rank pads to its own longest
    inputs = (
        io["image"][own],
        io["input_ids"][own, :length],
        io["attention_mask"][own, :length],
        io["idx"][own],
    )
    loss_ita, loss_itm = wrapped(*inputs)
    (loss_ita + loss_itm).backward()

    found = {"loss_ita": loss_ita.detach(), "loss_itm": loss_itm.detach()}
    for value in found.values():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    norms = {}
    for name in expected["grad_norms"]:
        part = getattr(model, name)
        grads = [p.grad for p in part.parameters()] if name != "temp" else [part.grad]
        norms[name] = torch.stack([grad.norm() for grad in grads]).norm().item()
    save_file(
        {name: getattr(model, name) for name in QUEUES}, output / f"queues_{rank}.safetensors"
    )
    if rank == 0:
        losses = {name: value.item() for name, value in found.items()}
        (output / "found.json").write_text(json.dumps({**losses, "grad_norms": norms}))

    wrapped(*inputs)  # fails if the first step left a parameter without gradient
    refusals = []
    try:
        wrapped(*(torch.cat([part, part]) for part in inputs))
    except ValueError as error:
        refusals.append(str(error))
    assert len(refusals) == 1 and "drop_last=True" in refusals[0], refusals
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
