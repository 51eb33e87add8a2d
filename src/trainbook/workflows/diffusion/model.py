"""The U-Net that predicts noise, its loss, and guided sampling; network and noise schedules are diffusers'."""

# B images, C channels, H height, W width, T timesteps; images lie in [-1, 1] here

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.data import NUM_CLASSES

NULL_CLASS = NUM_CLASSES  # the label of an image whose class is hidden
BETA_SCHEDULE = "squaredcos_cap_v2"


def make_unet(config: Config, image_shape: tuple[int, int, int]) -> UNet2DModel:
    """A U-Net for images (C, H, W), told the timestep and the class.

    Source: Ho et al. (2020), Denoising Diffusion Probabilistic Models, by diffusers.
    """
    channels, size, _ = image_shape
    kind = ["AttnDownBlock2D", "AttnUpBlock2D"] if config.attention else ["DownBlock2D", "UpBlock2D"]
    coarse = len(config.block_channels) - 1
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_channels,
        down_block_types=("DownBlock2D", *[kind[0]] * coarse),
        up_block_types=(*[kind[1]] * coarse, "UpBlock2D"),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        dropout=config.dropout,
        add_attention=config.attention,
        num_class_embeds=NUM_CLASSES + 1,
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def noise_schedule(config: Config) -> DDPMScheduler:
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) e with a_t a squared cosine of t / T.

    Source: Nichol and Dhariwal (2021), Improved Denoising Diffusion Probabilistic Models, equation 17.
    """
    return DDPMScheduler(config.num_timesteps, beta_schedule=BETA_SCHEDULE)


def hide_labels(labels: Tensor, share: float) -> Tensor:
    """Labels (B,), each replaced by `NULL_CLASS` with this probability."""
    return torch.where(torch.rand(len(labels), device=labels.device) < share, NULL_CLASS, labels)


def noise_loss(
    unet: nn.Module, schedule: DDPMScheduler, images: Tensor, labels: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean of |e - e_theta(x_t, t, y)|^2.

    Args:
        unet: what `make_unet` makes.
        schedule: of the noise.
        images: (B, C, H, W), in [-1, 1].
        labels: (B,), with `NULL_CLASS` where the class is hidden.
        timesteps: (B,), from 0 to T - 1.
        noise: (B, C, H, W), e, standard normal.

    Source: Ho et al. (2020), equation 14.
    """
    noisy = schedule.add_noise(images, noise, timesteps)
    return mse_loss(unet(noisy, timesteps, labels, return_dict=False)[0].float(), noise)


def training_loss(unet: nn.Module, schedule: DDPMScheduler, images: Tensor, labels: Tensor, label_dropout: float) -> Tensor:
    """`noise_loss` with timesteps, noise and hidden labels drawn from torch's global generator.

    Source: Ho and Salimans (2022), Classifier-Free Diffusion Guidance, algorithm 1.
    """
    timesteps = torch.randint(schedule.config.num_train_timesteps, (len(images),), device=images.device)
    return noise_loss(unet, schedule, images, hide_labels(labels, label_dropout), timesteps, torch.randn_like(images))


def guided_noise(unet: nn.Module, noisy: Tensor, timestep: Tensor, labels: Tensor, scale: float) -> Tensor:
    """e_w = e(x, 0) + w (e(x, y) - e(x, 0)): the unconditional prediction, pushed towards the class by the scale w.

    Args:
        unet: what `make_unet` makes.
        noisy: (B, C, H, W).
        timestep: ().
        labels: (B,).
        scale: w; 1 is the conditional model itself, and costs half.

    Source: Ho and Salimans (2022), equation 6, with w for 1 + w there.
    """
    if scale == 1:
        return unet(noisy, timestep, labels, return_dict=False)[0]
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    told, untold = unet(torch.cat([noisy, noisy]), timestep, both, return_dict=False)[0].chunk(2)
    return untold + scale * (told - untold)


@torch.no_grad()
def denoise(unet: nn.Module, config: Config, start: Tensor, labels: Tensor, scale: float) -> list[Tensor]:
    """Images after every step of DDIM without noise of its own, from `start` (left out) to the last, in [-1, 1].

    Args:
        unet: what `make_unet` makes, in evaluation mode.
        config: of the run.
        start: (B, C, H, W), standard normal.
        labels: (B,).
        scale: of the guidance.

    Source: Song et al. (2021), Denoising Diffusion Implicit Models, equation 12 with eta = 0.
    """
    schedule = DDIMScheduler(config.num_timesteps, beta_schedule=BETA_SCHEDULE)
    schedule.set_timesteps(config.num_inference_steps, device=start.device)
    images, steps = start, []
    for timestep in schedule.timesteps:
        predicted = guided_noise(unet, images, timestep, labels, scale)
        # The estimate of the image is cut to [-1, 1]; the noise must be what that leaves, or the two no longer add up to x_t.
        images = schedule.step(predicted, timestep, images, use_clipped_model_output=True).prev_sample
        steps.append(images)
    return [*steps[:-1], steps[-1].clamp(-1, 1)]


def draw_samples(
    unet: nn.Module, config: Config, image_shape: tuple[int, int, int], number: int, scale: float, seed: int = 0, chunk: int = 600
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and the classes they were asked for, in turn; the same for the same weights and seed."""
    was_training = unet.training
    device = next(unet.parameters()).device
    start = torch.randn(number, *image_shape, generator=torch.Generator().manual_seed(seed)).to(device)
    labels = torch.arange(number, device=device) % NUM_CLASSES
    unet.eval()
    parts = zip(start.split(chunk), labels.split(chunk), strict=True)
    images = torch.cat([denoise(unet, config, noise, asked, scale)[-1] for noise, asked in parts])
    unet.train(was_training)
    return (images + 1) / 2, labels
