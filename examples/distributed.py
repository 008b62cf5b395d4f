# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel, a process for each GPU, or for each part of the cores.

    torchrun --nproc-per-node 2 examples/distributed.py

Each process prunes its own gradients, with random numbers of its own: the average of what is unbiased is unbiased.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import sparsebwd
from sparsebwd import models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="resnet18", choices=models.names())
parser.add_argument("--batch-size", type=int, default=16, help="of each process")
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
else:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))

torch.manual_seed(0)  # the same weights everywhere
model = models.create(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
sparsebwd.convert(model, percentile=90)  # before the wrapper, which then sends what threshold="predicted" remembers
model = DistributedDataParallel(model, device_ids=[device] if cuda else None)
optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

torch.manual_seed(rank)  # other images, and other random numbers for pruning
with sparsebwd.DensityMonitor(model) as monitor:
    for step in range(options.steps):
        images = torch.randn(options.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        labels = torch.randint(10, (options.batch_size,), device=device)
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # gradients are averaged here
        optimiser.step()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")

if rank == 0:
    print(f"the gradients of one process of {processes}:\n{monitor}")
dist.destroy_process_group()
