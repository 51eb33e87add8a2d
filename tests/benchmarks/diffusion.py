"""What the kit adds to a diffusion training step: `python -m tests.benchmarks.diffusion`.

Allowed: 3 % more CPU time than the bare library loop with the same U-Net, batch, noise, optimizer, clipping and average.
"""

from collections.abc import Callable
from types import SimpleNamespace

from tests.benchmarks import pairing

# isort: split
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from trainbook.data import Data
from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.data import load_data
from trainbook.workflows.diffusion.model import NULL_CLASS, make_unet
from trainbook.workflows.diffusion.training import build, train

ROUNDS, STEPS = 9, 10
ALLOWED = 1.03


def our_steps(config: Config, data: Data) -> Callable[[], None]:
    """Takes so many steps of the workflow's own training of the U-Net, seeded as the engine does."""
    torch.manual_seed(0)
    state = build(config, data, SimpleNamespace(device="cpu"))
    state.stateful["classifier"].finished = True
    state.modules["snapshots"].steps = []
    records = train(config, data, state)

    def run() -> None:
        for _ in range(STEPS):
            seed_step(0, state.step)
            metrics = next(records).metrics
            float(metrics["loss"]), float(metrics["gradient_norm"])

    return run


def library_steps(config: Config, data: Data) -> Callable[[], None]:
    """Takes as many steps of the loop of diffusers' examples, without accelerate."""
    torch.manual_seed(0)
    unet = make_unet(config, tuple(data.train["images"].shape[1:]))
    schedule = DDPMScheduler(config.num_timesteps, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    average = EMAModel(unet.parameters(), decay=config.ema_decay, foreach=True)
    images, labels = 2 * data.train["images"] - 1, data.train["labels"]

    def run() -> None:
        for _ in range(STEPS):
            batch = torch.randint(len(images), (config.batch_size,))
            clean, told = images[batch], labels[batch]
            told = torch.where(torch.rand(len(told)) < config.label_dropout, NULL_CLASS, told)
            noise, timesteps = torch.randn_like(clean), torch.randint(config.num_timesteps, (len(clean),))
            predicted = unet(schedule.add_noise(clean, noise, timesteps), timesteps, told, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), config.clip_norm)
            optimizer.step()
            average.step(unet.parameters())
            loss.item(), norm.item()

    return run


def main() -> None:
    """Compare at the laptop preset's sizes."""
    config = Config.from_preset("laptop", {"validate_every": 0, "num_epochs": 1000})
    data = load_data(config, detect())
    print(f"torch {torch.__version__}, CPU, one thread, CPU time; batches of {config.batch_size}")
    comparison = pairing.alternate(
        our_steps(config, data),
        library_steps(config, data),
        ROUNDS,
        benchmark="diffusion step",
        peer="bare loop of diffusers and torch",
        unit="steps per second",
        units=STEPS,
    )
    overhead = 1 / comparison.ratio
    print(f"ours takes {overhead:.3f} of the peer's time, allowed {ALLOWED}: {'kept' if overhead <= ALLOWED else 'MISSED'}")
    pairing.report([comparison])


if __name__ == "__main__":
    main()
