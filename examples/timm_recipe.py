# SPDX-License-Identifier: Apache-2.0
"""A recipe with timm: its model, LAMB, a cosine with warm-up, mixup and cutmix, an average of the weights; one line is new.

    pip install timm
    python examples/timm_recipe.py --model resnet18

Images are random, in place of a loader by `timm.data.create_loader`. The average is a copy of the converted model: it is only
evaluated, and nothing is pruned there.
"""

import argparse
import sys

import torch

import sparsebwd

try:
    import timm
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3
except ImportError as error:
    sys.exit(f"this example needs timm, which cannot be imported ({error}): pip install timm")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="resnet18", help="any of timm.list_models()")
parser.add_argument("--batch-size", type=int, default=16, help="even, for mixup")
parser.add_argument("--size", type=int, default=96, help="of the images, in pixels")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--steps", type=int, default=5, help="in each epoch")
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    sparsebwd.keep_memory()
model = timm.create_model(options.model, num_classes=10).to(device, memory_format=torch.channels_last)
sparsebwd.convert(model, percentile=90)  # the line that is new; before whatever copies or wraps the model
print(sparsebwd.conversion_report(model), "\n")

optimiser = create_optimizer_v2(model, opt="lamb", lr=5e-3, weight_decay=0.02)
scheduler, epochs = create_scheduler_v2(
    optimiser, num_epochs=options.epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=options.steps
)
mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=10)
criterion = SoftTargetCrossEntropy()
average = ModelEmaV3(model, decay=0.99)

model.train()
with sparsebwd.DensityMonitor(model) as monitor:
    for step in range(epochs * options.steps):
        images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
        labels = torch.randint(10, (options.batch_size,), device=device)
        images, targets = mixup(images.to(memory_format=torch.channels_last), labels)
        loss = criterion(model(images), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update(model)
        scheduler.step_update(step + 1)
        print(f"step {step + 1}: loss {loss.item():.3f}, learning rate {optimiser.param_groups[0]['lr']:.2g}")

print(monitor)
with torch.no_grad():
    print(f"output of the averaged model: {tuple(average.module.eval()(images).shape)}")
